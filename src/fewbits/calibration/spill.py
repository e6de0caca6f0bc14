"""`KeptTensors`: tensors that wait for their use, in memory or in a temporary file."""

from __future__ import annotations

import math
import weakref
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryFile

import attrs
import torch
from torch import Tensor

from fewbits.calibration.collected import Key
from fewbits.errors import CalibrationError
from fewbits.numerics.tensor import in_memory, tensor_bytes


@attrs.frozen
class _Place:
    """The place of a tensor in a file, and its shape, dtype and device."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.shape) * self.dtype.itemsize


class _SpillFile:
    """A temporary file of tensors. It has no name where the system allows this, so it vanishes with the process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            self._file = TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  (it is open as long as this object)
        except OSError as error:
            raise self._error("spill activations to", error) from error
        weakref.finalize(self, self._file.close)

    def _error(self, action: str, error: OSError) -> CalibrationError:
        return CalibrationError(f"cannot {action} {self._folder}: {error.strerror}; give another directory (spill=)")

    def write(self, tensor: Tensor, start: int) -> _Place:
        plain = in_memory(tensor.detach())  # keep it: it may be a copy, and must live until its bytes are written
        left = tensor_bytes(plain)
        try:
            self._file.seek(start)
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise self._error("spill activations to", error) from error
        return _Place(start, tuple(plain.shape), plain.dtype, tensor.device)

    def read(self, place: _Place) -> Tensor:
        tensor = torch.empty(place.shape, dtype=place.dtype)
        left = tensor_bytes(tensor)
        try:
            self._file.seek(place.start)
            while left:
                count = self._file.readinto(left)
                if not count:
                    raise OSError(0, "the file was cut")
                left = left[count:]
        except OSError as error:
            raise self._error("read activations from", error) from error
        return tensor.to(place.device)


class KeptTensors:
    """A list of tensors, in memory or in a temporary file that is removed with the list.

    Args:
        folder: where to make the temporary file; None keeps the tensors in memory.

    Raises:
        CalibrationError: if the file cannot be made.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._file = None if folder is None else _SpillFile(folder)
        self._kept: list[Tensor | _Place | None] = []

    def append(self, tensor: Tensor | None) -> None:
        """Add a tensor. The list takes no copy of it in memory, so it must not change.

        Raises:
            CalibrationError: if it cannot be written.
        """
        if self._file is None or tensor is None:
            self._kept.append(tensor)
        else:
            stop = next((place.stop for place in reversed(self._kept) if isinstance(place, _Place)), 0)
            self._kept.append(self._file.write(tensor, stop))

    def truncate(self, count: int) -> None:
        """Forget all but the first `count` tensors."""
        del self._kept[count:]

    def release(self, at: int) -> None:
        """Forget one tensor; its place holds None from now on."""
        self._kept[at] = None

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._kept)

    def __getitem__(self, at: int) -> Tensor | None:
        """Return a tensor; one in the file is read into new memory."""
        kept = self._kept[at]
        if isinstance(kept, _Place):
            return None if self._file is None else self._file.read(kept)
        return kept

    def __iter__(self) -> Iterator[Tensor | None]:
        """Yield the tensors in order."""
        return (self[at] for at in range(len(self)))


class KeptInputs:
    """The inputs of the weights of a block, batch by batch.

    Args:
        folder: as in `KeptTensors`.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._tensors = KeptTensors(folder)
        self._batches: list[dict[Key, int]] = []

    def append(self, inputs: Mapping[Key, Tensor]) -> None:
        """Add the inputs of one batch."""
        self._batches.append({})
        for key, x in inputs.items():
            self._batches[-1][key] = len(self._tensors)
            self._tensors.append(x)

    def taken(self, batch: int, names: Collection[str]) -> dict[Key, Tensor]:
        """Return the inputs of some weights in one batch, and forget them; return nothing if no batch was added."""
        places = self._batches[batch] if self._batches else {}
        found = {}
        for key in [key for key in places if key[0] in names]:
            at = places.pop(key)
            x = self._tensors[at]
            self._tensors.release(at)
            if x is not None:
                found[key] = x
        return found
