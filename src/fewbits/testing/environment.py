"""What the checks look at from outside: bits, files, threads, blocks, modules that cannot be imported."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from fewbits.checkpoint.codec import CODEC, Value
from fewbits.checkpoint.raw import tensor_bytes
from fewbits.checkpoint.serializer import Serializer
from fewbits.errors import CheckpointError
from fewbits.numerics import layout
from fewbits.numerics.tensor import in_memory
from fewbits.validation.verify import verify

#: Names, and what must be equal of two tensors for them to be the same.
Snapshot = dict[str, tuple[tuple[int, ...], torch.dtype, bytes]]

#: Bytes of a file in which a bit is flipped, one at a time.
_FLIPS = 40


def snapshot(source: nn.Module | Mapping[str, Value]) -> Snapshot:
    """Every tensor of a model's state dict or of a mapping, codes and scales each under their own name."""
    values = source.state_dict() if isinstance(source, nn.Module) else source
    parts = {part: tensor for name, value in values.items() for part, tensor in CODEC.encode(name, value).items()}
    return {name: (tuple(tensor.shape), tensor.dtype, _bytes_of(tensor)) for name, tensor in parts.items()}


def _bytes_of(tensor: Tensor) -> bytes:
    tensor = in_memory(tensor)  # a name, so that it lives until its bytes are copied
    return bytes(tensor_bytes(tensor))


def files_in(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones included, with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def undetected_damage(path: Path, serializer: Serializer) -> tuple[list[int], int]:
    """Flip a bit here and there in copies of a file that fewbits wrote, one at a time, and verify them.

    Returns:
        the positions at which a flipped bit is not found although something reads differently, and the number of those
        at which it is found.

    Raises:
        Exception: what verifying raises besides the `CheckpointError` that it should.
    """
    whole, expected = path.read_bytes(), _as_read(path, serializer)
    step = max(1, len(whole) // _FLIPS)
    missed, found = [], 0
    for position in sorted({*range(step // 2, len(whole), step), len(whole) - 1}):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        # A new file each time: somebody may still have the last one mapped.
        copy = path.with_name(f"damaged-{position}-{path.name}")
        copy.write_bytes(damaged)
        if _is_found(copy, serializer):
            found += 1
        elif _as_read(copy, serializer) != expected:
            missed.append(position)
        copy.unlink()
    return missed, found


def _is_found(path: Path, serializer: Serializer) -> bool:
    try:
        return not verify(path, serializer=serializer).ok
    except CheckpointError:
        return True


def _as_read(path: Path, serializer: Serializer) -> tuple[Snapshot, Mapping[str, str]]:
    """Everything that a reader gives of a file; copied, because tensors may alias it."""
    reader = serializer.reader(path)
    return snapshot({name: reader.read(name).clone() for name in reader.entries}), dict(reader.metadata)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside, torch computes with this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def blocks_of(elements: int) -> Iterator[None]:
    """Inside, tensors are worked on in blocks of this many elements, in whole rows."""
    before = layout.BLOCK_ELEMENTS
    layout.BLOCK_ELEMENTS = elements
    try:
        yield
    finally:
        layout.BLOCK_ELEMENTS = before


@contextmanager
def not_importable(name: str) -> Iterator[None]:
    """Inside, importing this module fails; what was imported from it before goes on working."""
    before = sys.modules.get(name)
    sys.modules[name] = None  # type: ignore[assignment]  # the import system takes it for a module that is not there
    try:
        yield
    finally:
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before
