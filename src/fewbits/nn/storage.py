"""Which tensors share memory: the same view of it, or views that overlap."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import attrs
import torch
from torch import Tensor


@attrs.frozen
class View:
    """What of some memory a tensor shows. Two tensors are the same view of the same memory if these are equal.

    Attributes:
        memory: tells memory from other memory: a device, a file.
        start: its first byte there.
        shape: of the tensor.
        stride: likewise, in elements.
        dtype: likewise.
        other: whatever else tells it from others.
    """

    memory: str
    start: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    other: Hashable = None

    @classmethod
    def of(cls, tensor: Tensor) -> View:
        """The view that a tensor is.

        A tensor without memory (one without elements, one on the meta device) is like no other: that its address is 0,
        as theirs is, says nothing.
        """
        with torch._C.DisableTorchFunctionSubclass():
            start = tensor.data_ptr() if tensor.numel() else 0
            memory = str(tensor.device) if start else f"no memory, tensor {id(tensor)}"
            pending = tensor.is_conj(), tensor.is_neg()
            return cls(memory, start, tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, pending)

    @property
    def stop(self) -> int:
        """The byte after its last element; `start` if it has none."""
        if 0 in self.shape:
            return self.start
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        return self.start + (last + 1) * self.dtype.itemsize


def storage_key(tensor: Tensor) -> Hashable:
    """Equal for two tensors exactly if they are the same view of the same memory."""
    return View.of(tensor)


def overlaps(views: Mapping[str, View]) -> dict[str, str]:
    """A reason for each tensor whose memory overlaps another's without being the same view.

    The extent of a view is taken from its first to its last element, so that two interleaved views count as
    overlapping.
    """
    spans = sorted((view.memory, view.start, view.stop, name) for name, view in views.items() if view.stop > view.start)
    reasons: dict[str, str] = {}
    reach: tuple[str, int, str] | None = None
    for memory, start, stop, name in spans:
        if reach is not None and reach[0] == memory and start < reach[1]:
            other = reach[2]
            if views[other] != views[name]:
                reasons[name] = f"its memory overlaps that of {other}"
                reasons.setdefault(other, f"its memory overlaps that of {name}")
        if reach is None or reach[0] != memory or stop > reach[1]:
            reach = (memory, stop, name)
    return reasons
