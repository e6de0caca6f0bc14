"""`CountingObserver`: keeps a histogram of the inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

from fewbits.errors import ArgumentError
from fewbits.numerics.affine import choose_params
from fewbits.numerics.noise import group_sums
from fewbits.numerics.params import QuantParams
from fewbits.numerics.search import Choice
from fewbits.numerics.spec import QuantSpec
from fewbits.observers.accumulating import AccumulatingObserver
from fewbits.observers.histogram_counts import HistogramCounts

#: How much noise a value in a bin has on average, with some parameters: (lower bounds, upper bounds,
#: params, spec) to (1, 1, bins), in squares of the scale.
BinNoise: TypeAlias = Callable[[Tensor, Tensor, QuantParams, QuantSpec], Tensor]

#: Shares of the range of inputs to try, an eighth of an octave apart. Outliers may be large, so they span ten octaves.
_SHARES = [2 ** (-index / 8) for index in range(81)]


class CountingObserver(AccumulatingObserver[HistogramCounts]):
    """Keeps a histogram of the inputs of a layer.

    Args:
        bins: the number of bins on each side of zero, a power of two from 64 to 65536. On the side of the largest
            magnitude more than half of the bins are in use.

    Raises:
        ArgumentError: for another number of bins.
    """

    def __init__(self, bins: int = 2048) -> None:
        if type(bins) is not int or bins not in (1 << power for power in range(6, 17)):
            raise ArgumentError(f"bins must be a power of two from 64 to 65536, not {bins!r}")
        self.bins = bins

    def _statistics(self, x: Tensor) -> HistogramCounts | None:
        return HistogramCounts.of(x, self.bins)


def least_noise(seen: HistogramCounts, spec: QuantSpec, noise: BinNoise) -> QuantParams:
    """Choose scale and zero point with the least noise over a histogram, for a range within the extremes."""
    ends = seen.extremes.around_zero()
    if seen.exponent is None:
        return choose_params(*ends, spec)
    lower, upper, counts = seen.occupied()

    def total(params: QuantParams) -> Tensor:
        return group_sums(noise(lower, upper, params, spec) * counts).reshape(1)

    choice = Choice(*ends, spec, total)
    choice.narrow(_SHARES)
    return choice.params
