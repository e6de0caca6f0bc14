"""Parse and write the header of a safetensors file: the place of each tensor, and the metadata.

The format is https://github.com/huggingface/safetensors: eight bytes of header length (little-endian), a JSON header
that may end in spaces, the tensors' bytes without gaps. A header comes from anywhere: nothing in it is believed before
all of it has been checked, and no tensor is touched for that.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, BinaryIO, NoReturn

import attrs
import torch

from fewbits.checkpoint.serializer import Entry
from fewbits.errors import FormatError
from fewbits.numerics.dtypes import dtype_name
from fewbits.numerics.layout import MAX_AXES

#: The payload of a file of ours starts at a multiple of this, so that mapped codes are aligned for any kernel.
ALIGNMENT = 64

#: The safetensors library refuses longer headers.
MAX_HEADER = 100_000_000

#: The bytes before the header, which give its length.
PREFIX = 8

_METADATA = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}

_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "C64": "complex64",
}  # fmt: skip
_TO_TORCH: dict[str, torch.dtype] = {
    code: getattr(torch, name) for code, name in _DTYPES.items() if hasattr(torch, name)
}
_FROM_TORCH = {dtype: code for code, dtype in _TO_TORCH.items()}


@attrs.frozen
class Span:
    """One tensor's place in a file.

    Attributes:
        entry: the shape and dtype of the tensor.
        start: the first byte of the tensor, counted from the beginning of the file.
    """

    entry: Entry
    start: int


@attrs.frozen
class FileHeader:
    """The content of a file's header.

    Attributes:
        metadata: strings.
        spans: every tensor, by name, in the order of their bytes.
    """

    metadata: Mapping[str, str]
    spans: Mapping[str, Span]


def read_header(file: BinaryIO, where: object) -> FileHeader:
    """Read and check the header of an open file.

    Args:
        file: a file that is open for reading, in binary mode.
        where: the name of the file in errors.

    Raises:
        FormatError: if it is not the header of a safetensors file: too long, no JSON of the right form, a name twice,
            a dtype that torch lacks, or tensors that overlap, leave gaps, or do not end where the file does.
        OSError: if it cannot be read.
    """
    size = file.seek(0, 2)
    file.seek(0)
    length = int.from_bytes(file.read(PREFIX), "little")
    if size < PREFIX or length > size - PREFIX:
        _refuse(where, f"of its {size:,} bytes the header should take {length:,}, after {PREFIX} that say so")
    if length > MAX_HEADER:
        _refuse(where, f"its header has {length:,} bytes, more than {MAX_HEADER:,}")
    fields = parse_object(file.read(length), where, "header")
    metadata = fields.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        _refuse(where, f"{_METADATA} must map strings to strings")
    if odd := [text for text in [*fields, *metadata, *metadata.values()] if not _is_text(text)]:
        _refuse(where, f"{odd[0]!r} is no text that UTF-8 can hold")
    payload = PREFIX + length
    spans = {name: _span(name, described, payload, where) for name, described in fields.items()}
    spans = dict(sorted(spans.items(), key=lambda item: (item[1].start, item[1].start + item[1].entry.nbytes)))
    _check_places(spans, payload, size, where)
    return FileHeader(metadata, spans)


def is_possible(entry: Entry) -> bool:
    """Whether torch can compute with such a tensor. Strides of one without elements are computed all the same."""
    strided = math.prod(max(1, size) for size in entry.shape) * entry.dtype.itemsize
    return len(entry.shape) <= MAX_AXES and strided < 1 << 63


def dump_header(metadata: Mapping[str, str], entries: Mapping[str, Entry], where: object) -> bytes:
    """The JSON text of a header, for tensors that lie in the order of `entries`.

    Raises:
        FormatError: if safetensors cannot store a dtype or a name.
    """
    fields: dict[str, object] = {_METADATA: dict(metadata)}
    start = 0
    for name, entry in entries.items():
        if name == _METADATA:
            raise FormatError(f"{where}: no tensor in a safetensors file may be named {name!r}; rename it")
        if entry.dtype not in _FROM_TORCH:
            raise FormatError(f"{name} has dtype {dtype_name(entry.dtype)}, which safetensors cannot store")
        end = start + entry.nbytes
        fields[name] = {"dtype": _FROM_TORCH[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, end]}
        start = end
    try:
        return json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise FormatError(f"{where}: a name cannot be written as UTF-8: {error}") from None


def parse_object(text: bytes, where: object, what: str) -> dict[str, Any]:
    """A JSON object out of a file that may hold anything.

    Args:
        text: text in UTF-8.
        where: the name of the file in errors.
        what: the name of the text in errors.

    Raises:
        FormatError: if it is not a JSON object, is nested too deep, or has a key twice.
    """
    if not text.startswith(b"{"):
        raise FormatError(f"{where}: its {what} does not begin with {{")
    fields: dict[str, Any] = parse_json(text, where, what)
    return fields


def parse_json(text: bytes | str, where: object, what: str) -> Any:
    """Any JSON out of a file that may hold anything; `parse_object` describes arguments and errors."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            raise FormatError(f"{where}: {twice!r} is in its {what} twice")
        return fields

    try:
        return json.loads(text.decode() if isinstance(text, bytes) else text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, numbers of thousands of digits, nested too deep
        raise FormatError(f"{where}: its {what} is no JSON: {error}") from None


def _span(name: str, described: object, payload: int, where: object) -> Span:
    if not isinstance(described, dict) or described.keys() != _FIELDS:
        _refuse(where, f"{name!r} is not described by {', '.join(sorted(_FIELDS))}")
    code, shape, offsets = described["dtype"], described["shape"], described["data_offsets"]
    if not isinstance(code, str) or code not in _TO_TORCH:
        raise FormatError(f"{where}: {name} has dtype {code!r}, which this version of torch does not know")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        _refuse(where, f"{name!r} has a shape or offsets that are no lists of sizes")
    entry = Entry(tuple(shape), _TO_TORCH[code])
    if offsets[1] - offsets[0] != entry.nbytes:
        _refuse(where, f"{name!r} needs {entry.nbytes:,} bytes, and has those from {offsets[0]:,} to {offsets[1]:,}")
    if not is_possible(entry):
        _refuse(where, f"{name!r} has shape {entry.shape}, which no tensor can have")
    return Span(entry, payload + offsets[0])


def _is_text(text: str) -> bool:
    """Whether a string is one that UTF-8 can hold: JSON can spell halves of characters."""
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def _are_sizes(values: object) -> bool:
    """Whether this is a list of integers that a size or an offset can be."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _check_places(spans: Mapping[str, Span], payload: int, size: int, where: object) -> None:
    """Refuse tensors that overlap or leave gaps, since a gap could hide any bytes."""
    end = payload
    for name, span in spans.items():
        if span.start != end:
            _refuse(where, f"{name!r} begins at byte {span.start:,}, where {end:,} is due: tensors lie without gaps")
        end = span.start + span.entry.nbytes
    if end != size:
        _refuse(where, f"its tensors end at byte {end:,}, and the file at {size:,}")


def _refuse(where: object, what: str) -> NoReturn:
    raise FormatError(f"{where} is not a valid safetensors file: {what}")
