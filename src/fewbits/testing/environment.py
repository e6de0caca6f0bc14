"""Helpers of the checks: compare bits and files, measure, damage files."""

from __future__ import annotations

import io
import pickle
import tempfile
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from fewbits.checkpoint.codec import CODEC, Value
from fewbits.checkpoint.serializer import Serializer
from fewbits.errors import CheckpointError
from fewbits.numerics.metrics import sqnr_db
from fewbits.numerics.tensor import in_memory, tensor_bytes
from fewbits.testing.check import expect
from fewbits.validation.verify import verify

#: Name -> (shape, dtype, bytes). Equal snapshots mean equal tensors.
Snapshot = dict[str, tuple[tuple[int, ...], torch.dtype, bytes]]

#: Number of bytes of a file that are damaged, one at a time.
_FLIPS = 40


def snapshot(source: nn.Module | Mapping[str, Value]) -> Snapshot:
    """Record every tensor of a model's state dict or a mapping; codes and scales have names of their own."""
    values = source.state_dict() if isinstance(source, nn.Module) else source
    parts = {part: tensor for name, value in values.items() for part, tensor in CODEC.encode(name, value).items()}
    return {name: (tuple(tensor.shape), tensor.dtype, _bytes_of(tensor)) for name, tensor in parts.items()}


def _bytes_of(tensor: Tensor) -> bytes:
    tensor = in_memory(tensor)  # the name keeps it alive until its bytes are copied
    return bytes(tensor_bytes(tensor))


class _Pickler(pickle.Pickler):
    """Pickles the state of an object; code is named, so that classes need not be importable."""

    def persistent_id(self, value: object) -> str | None:
        """Name code instead of pickling it."""
        return repr(value) if isinstance(value, (type, types.FunctionType, types.ModuleType)) else None


def state_bytes(value: object) -> int:
    """Count the bytes of the state of an object."""
    stream = io.BytesIO()
    _Pickler(stream).dump(value)
    return stream.tell()


def sqnr_of(found: Tensor, expected: Tensor) -> float:
    """Measure the SQNR of a result in dB against the expected numbers."""
    expected = expected.double()
    return sqnr_db(float(expected.square().sum()), float((found.double() - expected).square().sum()))


@contextmanager
def folder() -> Iterator[Path]:
    """Give a new folder, and remove it at the end."""
    with tempfile.TemporaryDirectory(prefix="fewbits-") as name:
        yield Path(name)


def files_in(folder: Path) -> dict[str, bytes]:
    """Read every file below a folder, hidden files included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_damage(path: Path, serializer: Serializer) -> None:
    """Flip one bit in each of several copies of a file: `verify` must find it if it changes the result of reading.

    Raises:
        Exception: if `verify` raises anything but a `CheckpointError`.
    """
    whole, expected = path.read_bytes(), _as_read(path, serializer)
    step = max(1, len(whole) // _FLIPS)
    missed, found = [], 0
    for position in sorted({*range(step // 2, len(whole), step), len(whole) - 1}):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        # The serializer may still map the last file, so each copy has a name of its own.
        copy = path.with_name(f"damaged-{position}-{path.name}")
        copy.write_bytes(damaged)
        if _is_found(copy, serializer):
            found += 1
        elif _as_read(copy, serializer) != expected:
            missed.append(position)
        copy.unlink()
    expect(not missed, f"flipped bits in bytes {missed} change the tensors, and verify finds nothing")
    expect(found > 0, "verify finds none of the flipped bits")


def _is_found(path: Path, serializer: Serializer) -> bool:
    try:
        return not verify(path, serializer=serializer).ok
    except CheckpointError:
        return True


def _as_read(path: Path, serializer: Serializer) -> tuple[Snapshot, Mapping[str, str]]:
    """Read everything in a file; tensors are copied, because they may alias the file."""
    reader = serializer.reader(path)
    return snapshot({name: reader.read(name).clone() for name in reader.entries}), dict(reader.metadata)
