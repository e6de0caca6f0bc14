"""Mutations of a case that keep most of it valid, so that they also reach code behind the first check."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

import attrs

import json_mutations
import zip_mutations
from case import SCHEMES, Case, Item, parse
from support.checkpoints import DIGEST_KEY, sign

#: Bytes per element of the dtypes in safetensors files.
_WIDTHS = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "I8": 1, "BOOL": 1, "F8_E4M3": 1, "C64": 8,
}  # fmt: skip

_METADATA = "__metadata__"
_TARGETS = (
    b"..", b"../..", b"/etc/passwd", b"/dev/zero", b"/dev/null", b"missing", b"model.safetensors", b"config.json", b".",
)  # fmt: skip
_NAMES = (
    "model.safetensors", "model.safetensors.index.json", "model-00001-of-00002.safetensors", "pytorch_model.bin",
    "pytorch_model.bin.index.json", "other.safetensors", "config.json", "sub/config.json", "model.bin", "a.gguf",
    ".hidden", "snapshots/main/model.safetensors", "blobs/0123",
)  # fmt: skip
_TENSORS = (
    "a.weight", "a.bias", "weight", "a.weight_scale", "a.weight_packed", "embed.weight", "a.qweight", "a.scales", "z",
)  # fmt: skip
_SHAPES = ([2, 3, 1, 1], [1] * 70, [], [1 << 62, 4, 0])

#: Changes bytes without knowing their format.
Mangle = Callable[[bytes, Random], bytes]


def mutated(data: bytes, seed: int, limit: int, mangle: Mangle | None = None) -> bytes:
    """Apply a few random changes to a case.

    Args:
        data: the case as bytes.
        seed: seed of the random changes; the result depends on nothing else.
        limit: maximum bytes of the result; a change that would exceed it is skipped.
        mangle: changes bytes without knowing their format; None flips some bits.
    """
    rng = Random(seed)
    case = parse(data)
    if case is None:
        return data[:limit]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        other = _changed(case, rng, mangle or flipped)
        if len(other.to_bytes()) <= limit and parse(other.to_bytes()) is not None:
            case = other
    return case.to_bytes()


def crossed(data: bytes, other: bytes, seed: int, limit: int) -> bytes:
    """Add a file of another case to a case, or replace files by it."""
    rng, case, from_case = Random(seed), parse(data), parse(other)
    if case is None or from_case is None or not from_case.items:
        return data[:limit]
    taken = rng.choice(from_case.items)
    items = [item for item in case.items if item.name != taken.name and rng.random() < 0.8]
    made = attrs.evolve(case, items=(*items, taken)).to_bytes()
    return made if len(made) <= limit and parse(made) is not None else data[:limit]


def flipped(data: bytes, rng: Random) -> bytes:
    """Flip some bits, and perhaps cut, double or insert some bytes."""
    changed = bytearray(data or b"\0")
    for _ in range(rng.randint(1, 3)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    at, stop = sorted(rng.randrange(len(changed) + 1) for _ in range(2))
    choice = rng.randrange(5)
    if choice == 0:
        del changed[at:stop]
    elif choice == 1:
        changed[at:at] = changed[at:stop]
    elif choice == 2:
        changed[at:at] = bytes(rng.randrange(9))
    return bytes(changed)


def _changed(case: Case, rng: Random, mangle: Mangle) -> Case:
    files = [index for index, item in enumerate(case.items) if item.kind == "file"]
    if not files or rng.random() < 0.1:
        return _rearranged(case, rng)
    index = rng.choice(files)
    item = case.items[index]
    new = attrs.evolve(item, data=_content(item, rng, mangle))
    return attrs.evolve(case, items=(*case.items[:index], new, *case.items[index + 1 :]))


def _rearranged(case: Case, rng: Random) -> Case:
    """Change the files, their names, the path or the scheme."""
    items, what = [*case.items], rng.randrange(8)
    index = rng.randrange(len(items)) if items else 0
    if what == 0:
        return attrs.evolve(case, scheme=rng.choice(SCHEMES))
    if what == 1:
        return attrs.evolve(case, path=rng.choice((".", "sub", *[item.name for item in items])))
    if what == 2:
        items.insert(index, Item("link", rng.choice(_NAMES), rng.choice(_TARGETS)))
    elif what == 3:
        items.insert(index, Item("pipe", rng.choice(_NAMES)))
    elif what == 4 and items:
        items.insert(index, attrs.evolve(items[index], name=rng.choice(_NAMES)))
    elif what == 5 and items:
        items[index] = attrs.evolve(items[index], name=rng.choice(_NAMES))
    elif what == 6 and items:
        items[index] = Item("link", items[index].name, rng.choice(_TARGETS))
    elif items:
        del items[index]
    return attrs.evolve(case, items=tuple(items))


def _content(item: Item, rng: Random, mangle: Mangle) -> bytes:
    if rng.random() < 0.07:
        return mangle(item.data, rng)
    if item.data.startswith(b"PK"):
        return zip_mutations.changed(item.data, rng)
    if item.name.endswith(".json"):
        return _json(item.data, rng, mangle)
    return _safetensors(item.data, rng, mangle)


def _json(data: bytes, rng: Random, mangle: Mangle) -> bytes:
    try:
        return json_mutations.dump(json_mutations.changed(json.loads(data), rng)).encode()
    except (ValueError, RecursionError, OverflowError):
        return mangle(data, rng)


# Safetensors files.


def _safetensors(data: bytes, rng: Random, mangle: Mangle) -> bytes:
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        payload = data[8 + length :]
        if not isinstance(header, dict):
            return mangle(data, rng)
        header, inner = _unfolded(header)
        header, payload = rng.choice(_CHANGES)(header, inner, payload, rng)
        text = _folded(header, inner, payload, rng)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError):
        return mangle(data, rng)  # the file is too damaged for a structured change
    size = len(text)
    if rng.random() < 0.02:
        size = rng.choice((0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1))
    return size.to_bytes(8, "little") + text + payload


def _unfolded(header: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The header, and the metadata strings that contain JSON, decoded."""
    inner: dict[str, Any] = {}
    metadata = header.get(_METADATA)
    for key, value in metadata.items() if isinstance(metadata, dict) else ():
        if isinstance(value, str) and value[:1] in "[{" and value:
            inner[key] = json.loads(value)
    return header, inner


def _folded(header: dict[str, Any], inner: dict[str, Any], payload: bytes, rng: Random) -> bytes:
    """The text of the header. In fewbits files, half of the time, digests are recomputed."""
    metadata = header.get(_METADATA)
    if not isinstance(metadata, dict) or DIGEST_KEY not in metadata:
        return json_mutations.dump(header).encode(errors="surrogatepass")
    if rng.random() < 0.5 and isinstance(inner.get("fewbits.digests"), dict):
        inner["fewbits.digests"].update(_digests(header, inner["fewbits.digests"], payload))
    metadata |= {key: json_mutations.dump(value) for key, value in inner.items()}
    text = json_mutations.dump(header)
    if rng.random() < 0.7:
        # Sign the values that a reader sees, after the markers are expanded.
        header = json.loads(text)
        sign(header)
        text = json.dumps(header, separators=(",", ":")) if rng.random() < 0.8 else text
    return text.encode(errors="surrogatepass")


def _digests(header: dict[str, Any], known: dict[str, Any], payload: bytes) -> dict[str, str]:
    made = {}
    for name in known.keys() & header.keys():
        start, stop = header[name]["data_offsets"]
        made[name] = hashlib.sha256(payload[start:stop]).hexdigest()
    return made


_Changed = tuple[dict[str, Any], bytes]


def _change_header(header: dict[str, Any], inner: dict[str, Any], payload: bytes, rng: Random) -> _Changed:
    return json_mutations.changed(header, rng), payload


def _change_inner(header: dict[str, Any], inner: dict[str, Any], payload: bytes, rng: Random) -> _Changed:
    """Change the metadata of a fewbits file, or the header of any other file."""
    if not inner:
        return _change_header(header, inner, payload, rng)
    key = rng.choice([*inner])
    inner[key] = json_mutations.changed(inner[key], rng)
    return header, payload


def _change_numbers(header: dict[str, Any], inner: dict[str, Any], payload: bytes, rng: Random) -> _Changed:
    """Write NaN, Inf or extreme numbers to one element or all elements of a tensor."""
    names = [name for name in header if name != _METADATA]
    # In fewbits files, prefer scales, shapes and zero points: they are small, and most checks depend on them.
    telling = [name for name in names if name.endswith(("_scale", "_shape", "_zero_point"))]
    entry = header[rng.choice(telling if telling and rng.random() < 0.6 else names)]
    # An earlier change may have moved the offsets beyond the payload.
    start, stop = (min(offset, len(payload)) for offset in entry["data_offsets"])
    number = _number(entry["dtype"], rng)
    if rng.random() < 0.5 and stop > start:
        at = start + len(number) * rng.randrange(max(1, (stop - start) // len(number)))
        return header, payload[:at] + number + payload[at + len(number) :]
    return header, payload[:start] + number * ((stop - start) // len(number)) + payload[stop:]


def _number(dtype: str, rng: Random) -> bytes:
    kinds = {"F64": "d", "F32": "f", "F16": "e"}
    width = _WIDTHS[dtype]
    if dtype == "BF16":
        return struct.pack("f", rng.choice((0.0, -1.0, float("nan"), float("inf"), 3e38, 1e-40)))[2:]
    if dtype in kinds:
        largest = {"d": 1.7e308, "f": 3.4e38, "e": 65504.0}[kinds[dtype]]
        smallest = {"d": 5e-324, "f": 1e-45, "e": 6e-8}[kinds[dtype]]
        values = (0.0, -0.0, -1.0, float("nan"), float("inf"), float("-inf"), largest, -largest, smallest)
        return struct.pack(kinds[dtype], rng.choice(values))
    whole = rng.choice((0, 1, 2, (1 << (8 * width - 1)) - 1, 1 << (8 * width - 1), (1 << 8 * width) - 1))
    return whole.to_bytes(width, "little")


def _change_tensor(header: dict[str, Any], inner: dict[str, Any], payload: bytes, rng: Random) -> _Changed:
    """Change the shape, dtype, name or number of tensors, and adapt offsets and payload."""
    tensors = {}
    for name, entry in header.items():
        if name != _METADATA:
            start, stop = entry["data_offsets"]
            tensors[name] = entry["dtype"], entry["shape"], payload[start:stop]
    name = rng.choice([*tensors])
    dtype, shape, data = tensors[name]
    what = rng.randrange(6)
    if what == 0:
        del tensors[name]
    elif what == 1:
        tensors[rng.choice((*_TENSORS, f"{name}_scale", f"{name}_scale_inv", f"{name}2"))] = tensors[name]
    elif what == 2:
        tensors[rng.choice((*_TENSORS, f"{name}_packed", "\u00e9", "", "." * 5))] = tensors.pop(name)
    elif what == 3:
        tensors[name] = rng.choice([*_WIDTHS]), shape, data
    elif what == 4:
        tensors[name] = dtype, rng.choice((shape[::-1], [*shape, 1], [1, *shape], [*shape, 0], *_SHAPES)), data
    else:
        tensors[name] = dtype, [rng.choice((0, 1, 2, 5, 31, 40)) for _ in range(rng.randrange(4))], data
    return _packed(tensors, header.get(_METADATA))


def _packed(tensors: dict[str, tuple[str, list[int], bytes]], metadata: Any) -> _Changed:
    header: dict[str, Any] = {} if metadata is None else {_METADATA: metadata}
    payload = b""
    for name, (dtype, shape, data) in tensors.items():
        size = _WIDTHS[dtype]
        for length in shape:
            size *= length
        size = min(size, 1 << 14)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(payload), len(payload) + size]}
        payload += (data * (1 + size // max(1, len(data))))[:size] if data else bytes(size)
    return header, payload


def _swap_offsets(header: dict[str, Any], inner: dict[str, Any], payload: bytes, rng: Random) -> _Changed:
    entries = [entry for name, entry in header.items() if name != _METADATA]
    one, other = rng.choice(entries), rng.choice(entries)
    one["data_offsets"], other["data_offsets"] = other["data_offsets"], one["data_offsets"]
    return header, payload


def _change_size(header: dict[str, Any], inner: dict[str, Any], payload: bytes, rng: Random) -> _Changed:
    return header, rng.choice((payload[: rng.randrange(len(payload) + 1)], payload + bytes(rng.randrange(1, 9)), b""))


def _flip_payload(header: dict[str, Any], inner: dict[str, Any], payload: bytes, rng: Random) -> _Changed:
    if not payload:
        return header, payload
    at = rng.randrange(len(payload))
    return header, payload[:at] + bytes([payload[at] ^ 1 << rng.randrange(8)]) + payload[at + 1 :]


_CHANGES = (
    _change_header, _change_header, _change_inner, _change_inner, _change_inner, _change_inner, _change_numbers,
    _change_numbers, _change_tensor, _change_tensor, _swap_offsets, _change_size, _flip_payload,
)  # fmt: skip
