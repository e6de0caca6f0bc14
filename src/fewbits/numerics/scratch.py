"""Memory for intermediate results that are made anew for every block."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class Scratch:
    """Keeps the memory of intermediate results from one block to the next.

    Freed after every block, it would be given back to the system and zeroed again for the next one, which takes longer
    than most of what is computed in it.
    """

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A contiguous tensor with any contents; what was taken by the same name before is overwritten with it."""
        memory, size = self._memory.get(name), math.prod(shape)
        if memory is None or memory.numel() < size or (memory.dtype, memory.device) != (dtype, device):
            memory = self._memory[name] = torch.empty(*shape, dtype=dtype, device=device)
        return memory if memory.shape == shape else memory.view(-1)[:size].view(*shape)


_thread = threading.local()


def scratch() -> Scratch:
    """The memory that this thread works in, inside of `working_in`; new memory elsewhere."""
    kept: Scratch | None = getattr(_thread, "kept", None)
    return Scratch() if kept is None else kept


@contextmanager
def working_in(kept: Scratch) -> Iterator[None]:
    """Let everything that this thread quantizes use the same memory, one tensor after the other."""
    before, _thread.kept = getattr(_thread, "kept", None), kept
    try:
        yield
    finally:
        _thread.kept = before
