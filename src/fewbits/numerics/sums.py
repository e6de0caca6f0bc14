"""Sums in an order that nothing but the number of terms decides: not threads, not the instruction set."""

from __future__ import annotations

from torch import Tensor


def group_sums(values: Tensor) -> Tensor:
    """The sums along the last axis, in float64. The values are overwritten.

    The halves of a group are added, element by element, until one is left.
    """
    width = values.shape[-1]
    while width > 1:
        half = width // 2
        values.narrow(-1, 0, half).add_(values.narrow(-1, width - half, half))
        width -= half
    return values[..., 0].double()
