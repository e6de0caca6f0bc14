"""Find tensors that share memory: equal views of it, or views that overlap."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import attrs
import torch
from torch import Tensor


@attrs.frozen
class View:
    """The bytes that a tensor refers to, and how the tensor reads them. Equal views: one tensor under two names.

    Attributes:
        memory: Where the bytes are: a device, the path of a file, or a unique text for a tensor without memory.
        start: The position of the first byte: an address, or an offset in the file; 0 without memory.
        shape: The shape of the tensor.
        stride: The strides of the tensor, in elements.
        dtype: The dtype of the tensor.
        other: The pending conjugation and negation, or the id of an empty tensor in a file.
    """

    memory: str
    start: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    other: Hashable = None

    @classmethod
    def of(cls, tensor: Tensor) -> View:
        """Return the view of a tensor.

        Tensors without memory (no elements, on the meta device, or with freed storage) share nothing: the views of two
        of them differ as long as both tensors exist.
        """
        with torch._C.DisableTorchFunctionSubclass():
            start = tensor.data_ptr() if tensor.numel() else 0
            memory = str(tensor.device) if start else f"no memory, tensor {id(tensor)}"
            pending = tensor.is_conj(), tensor.is_neg()
            return cls(memory, start, tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, pending)

    @property
    def stop(self) -> int:
        """The address of the byte after the last element; `start` if there are no elements."""
        if 0 in self.shape:
            return self.start
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        return self.start + (last + 1) * self.dtype.itemsize


def overlaps(views: Mapping[str, View]) -> dict[str, str]:
    """Give a reason for each tensor whose memory overlaps that of another tensor, unless both are the same view.

    A view extends from its first to its last element, so interleaved views count as overlapping.
    """
    spans = sorted((view.memory, view.start, view.stop, name) for name, view in views.items() if view.stop > view.start)
    reasons: dict[str, str] = {}
    reached, end, other = "", 0, ""  # the memory and the end of the spans so far, and the span that ends there
    for memory, start, stop, name in spans:
        if memory == reached and start < end and views[other] != views[name]:
            reasons[name] = f"its memory overlaps that of {other}"
            reasons.setdefault(other, f"its memory overlaps that of {name}")
        if memory != reached or stop > end:
            reached, end, other = memory, stop, name
    return reasons
