"""Which tensors share memory: the same view of it, or views that overlap."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from torch import Tensor


def storage_key(tensor: Tensor) -> Hashable:
    """Equal for two tensors exactly if they are the same view of the same memory."""
    if not tensor.numel():
        return id(tensor)
    pending = tensor.is_conj(), tensor.is_neg()
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, pending


def overlaps(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """A reason for each tensor whose memory overlaps another's without being the same view.

    The extent of a view is taken from its first to its last element, so that two interleaved views count as
    overlapping.
    """
    spans = []
    for name, tensor in tensors.items():
        if tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            start = tensor.data_ptr()
            spans.append((str(tensor.device), start, start + (last + 1) * tensor.element_size(), name))
    reasons: dict[str, str] = {}
    reach: tuple[str, int, str] | None = None
    for device, start, stop, name in sorted(spans):
        if reach is not None and reach[0] == device and start < reach[1]:
            other = reach[2]
            if storage_key(tensors[other]) != storage_key(tensors[name]):
                reasons[name] = f"its memory overlaps that of {other}"
                reasons.setdefault(other, f"its memory overlaps that of {name}")
        if reach is None or reach[0] != device or stop > reach[1]:
            reach = (device, stop, name)
    return reasons
