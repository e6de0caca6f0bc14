"""Read the tensors of a compressed-tensors checkpoint and convert them, by rows, to parts of a `QuantizedTensor`."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fewbits.checkpoint.folder import CheckpointFiles
from fewbits.checkpoint.metadata import part_name
from fewbits.checkpoint.serializer import ChunkReader, Entry, Reader, Serializer
from fewbits.errors import FormatError
from fewbits.formats.compressed_weight import CompressedWeight, matrix_form
from fewbits.numerics.float8 import float8_codes
from fewbits.numerics.packing import pack, packed_words, unpack
from fewbits.numerics.tensor import pack_zero_point

#: Largest number of axes of a weight.
_MOST_AXES = 8


class StoredTensors:
    """Read tensors of several files by name, and only the requested elements where the serializer allows it.

    Attributes:
        entries: shape and dtype of each tensor, by name.

    Raises:
        FormatError: if two files contain a tensor of the same name, or the index contradicts the files.
        CheckpointError: if a file cannot be opened.
    """

    def __init__(self, files: CheckpointFiles, serializer: Serializer) -> None:
        self._readers: dict[str, Reader] = {}
        by_file = {path.name: serializer.reader(path) for path in files.paths}
        for file, reader in by_file.items():
            if twice := sorted(self._readers.keys() & reader.entries.keys()):
                raise FormatError(f"{file}: {', '.join(twice)} is also in another file of the checkpoint")
            self._readers |= dict.fromkeys(reader.entries, reader)
        for name, file in (files.weight_map or {}).items():
            if name not in by_file[file].entries:
                raise FormatError(f"{files.index} says that {name} is in {file}, but that file lacks it")
        self.entries: Mapping[str, Entry] = {name: reader.entries[name] for name, reader in self._readers.items()}

    def read(self, name: str, start: int = 0, shape: tuple[int, ...] | None = None) -> Tensor:
        """Return a copy of elements of a tensor, from `start` on, in the given shape; the whole tensor without one."""
        entry, reader = self.entries[name], self._readers[name]
        shape = entry.shape if shape is None else shape
        if isinstance(reader, ChunkReader):
            out = torch.empty(shape, dtype=entry.dtype, device="cpu")
            reader.read_into(name, start, out)
            return out
        return reader.read(name).reshape(-1)[start : start + math.prod(shape)].reshape(shape)


def stated_shape(tensors: StoredTensors, name: str) -> tuple[int, ...] | None:
    """Return the shape of a weight stored beside its codes; None if no shape is stored.

    Raises:
        FormatError: if the tensor is not a shape.
    """
    part = part_name(name, "shape")
    entry = tensors.entries.get(part)
    if entry is None:
        return None
    if entry.dtype not in (torch.int64, torch.int32) or len(entry.shape) != 1 or not 2 <= entry.numel <= _MOST_AXES:
        raise FormatError(f"{part} is {entry}; a shape is two integers or more, in one axis")
    return tuple(tensors.read(part).tolist())


def column_order(tensors: StoredTensors, weight: CompressedWeight) -> Tensor:
    """Return the column indices, sorted by group.

    Raises:
        FormatError: if a group does not have the group size's number of columns.
    """
    part, width = weight.part("g_idx"), weight.spec.width(weight.layout.columns)
    groups = tensors.read(part).long()
    order = torch.argsort(groups, stable=True)
    if not torch.equal(groups[order], torch.arange(len(groups)) // width):
        raise FormatError(f"{part} does not give each group {width} columns")
    return order


def packed_codes(tensors: StoredTensors, weight: CompressedWeight, order: Tensor | None, rows: slice) -> Tensor:
    """Return the codes of some rows, with columns in the given order, packed as in `fewbits.numerics.packing`.

    Raises:
        FormatError: if a code is NaN, infinite, or outside the range of its bits.
    """
    count, columns, bits = rows.stop - rows.start, weight.layout.columns, weight.spec.bits
    if weight.form == "packed":
        words = packed_words(columns, bits)
        packed = tensors.read(weight.codes, rows.start * words, (count, words))
        return packed if order is None else pack(unpack(packed, bits, columns)[:, order], bits)
    values = tensors.read(weight.codes, rows.start * columns, (count, columns))
    codes = float8_codes(values) if weight.form == "float8" else _unsigned(weight, values)
    if codes is None:
        raise FormatError(f"{weight.codes} holds NaN or Inf")
    return pack(codes if order is None else codes[:, order], bits)


def scale_and_zero_point(tensors: StoredTensors, weight: CompressedWeight, rows: slice) -> tuple[Tensor, Tensor | None]:
    """Return the scales of some rows and their zero points, packed as in fewbits files.

    With zero points, the first row must be a multiple of 32.

    Raises:
        FormatError: if a zero point is outside the range of its bits.
    """
    spec, shared = weight.spec, weight.spec.granularity == "tensor"
    _, groups = matrix_form(tensors.entries[weight.part("scale")].shape)
    first, after = (0, 1) if shared else (rows.start // weight.block_rows, -(-rows.stop // weight.block_rows))
    scale = tensors.read(weight.part("scale"), first * groups, (after - first, groups))
    if weight.block_rows > 1:
        scale = scale[torch.arange(rows.start, rows.stop) // weight.block_rows - first]
    zero_point = None
    if weight.zero_point == "packed":
        words = packed_words(after - first, spec.bits)
        zero_point = tensors.read(weight.part("zero_point"), first * spec.bits // 32 * groups, (words, groups))
    elif weight.zero_point == "bytes":
        values = tensors.read(weight.part("zero_point"), first * groups, (after - first, groups))
        _unsigned(weight, values)
        zero_point = pack_zero_point(values.to(torch.int32), spec)
    if shared:
        return scale.reshape(1), None if zero_point is None else zero_point.reshape(-1)
    return scale, zero_point


def _unsigned(weight: CompressedWeight, values: Tensor) -> Tensor:
    """Convert signed one-byte codes to unsigned.

    Raises:
        FormatError: if a code is outside the range of its bits.
    """
    low, high = map(int, torch.aminmax(values))
    if low < weight.spec.code_min or high > weight.spec.code_max:
        raise FormatError(f"{weight.name} has codes or zero points from {low} to {high}, beyond {weight.scheme}")
    return (values.to(torch.int16) - weight.spec.code_min).to(torch.uint8)
