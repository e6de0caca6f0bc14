"""`MinMaxObserver`: scales from the extremes."""

from __future__ import annotations

from torch import Tensor

from fewbits.numerics.quantize import min_max
from fewbits.numerics.spec import QuantSpec
from fewbits.observers.base import Observer


class MinMaxObserver(Observer):
    """Takes the smallest scale with which nothing clips.

    Symmetric: the largest magnitude over ``2**(bits-1) - 1``. Asymmetric: the range from the smallest to the
    largest element, zero included, over ``2**bits - 1``.
    """

    def observe_weight(self, weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point from the extremes of each group."""
        return min_max(weight, spec)
