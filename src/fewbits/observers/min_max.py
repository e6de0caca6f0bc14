"""`MinMaxObserver`: takes scales from the extremes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fewbits.numerics.params import QuantParams
from fewbits.numerics.quantize import min_max
from fewbits.numerics.scales import choose_params, extremes
from fewbits.numerics.spec import QuantSpec
from fewbits.observers.accumulating import AccumulatingObserver
from fewbits.observers.extremes import Extremes


class MinMaxObserver(AccumulatingObserver[Extremes]):
    """Takes the smallest scale with which nothing clips. For weights of eight bits, and inputs without outliers.

    Symmetric: the scale is the largest magnitude over ``2**(bits-1) - 1``. Asymmetric: the scale is the range from the
    smallest to the largest element, zero included, over ``2**bits - 1``. For inputs, the extremes are those of all
    inputs seen.
    """

    def observe_weight(self, weight: Tensor, spec: QuantSpec) -> QuantParams:
        """Pick scale and zero point from the extremes of each group."""
        return min_max(weight, spec)

    @property
    def gathers_chunks(self) -> bool:
        """False, unless a subclass overrides `observe_weight`."""
        return type(self).observe_weight is not MinMaxObserver.observe_weight

    def observe_chunks(self, chunks: Iterable[Tensor], spec: QuantSpec) -> QuantParams:
        """Pick scale and zero point from the extremes of all chunks."""
        if self.gathers_chunks:
            return super().observe_chunks(chunks, spec)
        lows, highs = zip(*(extremes(chunk, spec) for chunk in chunks), strict=True)
        return choose_params(torch.stack(lows).amin(0), torch.stack(highs).amax(0), spec)

    def _statistics(self, x: Tensor) -> Extremes | None:
        return Extremes.of(x)

    def _choose(self, seen: Extremes, spec: QuantSpec) -> QuantParams:
        return choose_params(*seen.around_zero(), spec)
