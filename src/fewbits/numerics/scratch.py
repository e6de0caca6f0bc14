"""Reuse memory for the intermediate results of every block."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class Scratch:
    """Keeps the memory of intermediate results from one block to the next.

    If the memory were freed after every block, the system would take it back and zero it again for the next block.
    That takes longer than most of the computation.
    """

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a contiguous, uninitialized tensor; it reuses the memory taken before under the same name."""
        memory, size = self._memory.get(name), math.prod(shape)
        if memory is None or memory.numel() < size or (memory.dtype, memory.device) != (dtype, device):
            memory = self._memory[name] = torch.empty(*shape, dtype=dtype, device=device)
        return memory if memory.shape == shape else memory.view(-1)[:size].view(*shape)


_thread = threading.local()


def scratch() -> Scratch:
    """Return the memory that `working_in` set for this thread; new memory outside of `working_in`."""
    kept: Scratch | None = getattr(_thread, "kept", None)
    return Scratch() if kept is None else kept


@contextmanager
def working_in(kept: Scratch) -> Iterator[None]:
    """Make all tensors that this thread quantizes inside the block use the same memory, one after the other."""
    before, _thread.kept = getattr(_thread, "kept", None), kept
    try:
        yield
    finally:
        _thread.kept = before
