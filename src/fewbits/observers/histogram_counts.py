"""Count how many inputs of each size were seen, independent of their order, and choose scales by the counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import TypeAlias

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.errors import ArgumentError
from fewbits.numerics.noise import group_sums
from fewbits.numerics.params import QuantParams
from fewbits.numerics.scales import choose_params
from fewbits.numerics.search import Choice
from fewbits.numerics.spec import QuantSpec
from fewbits.observers.accumulating import AccumulatingObserver
from fewbits.observers.extremes import Extremes

#: How much noise a value in a bin has on average, with some parameters: (lower bounds, upper bounds,
#: params, spec) to (1, 1, bins), in squares of the scale.
BinNoise: TypeAlias = Callable[[Tensor, Tensor, QuantParams, QuantSpec], Tensor]

#: Shares of the range of inputs to try, an eighth of an octave apart. Outliers may be large, so they span ten octaves.
_SHARES = [2 ** (-index / 8) for index in range(81)]

#: The exponent of the smallest positive float64.
_MIN_EXPONENT = -1074

#: How many elements are counted at a time. In float64, they and their bins fit into a core's own cache.
_BLOCK = 1 << 14


@attrs.frozen(eq=False)
class HistogramCounts:
    """A histogram with bins of equal width, a power of two, that begin at zero.

    The width is the smallest one that gives the largest magnitude seen a bin. When a larger magnitude comes, pairs of
    bins are merged until the magnitude has a bin. Since ``floor(floor(x / w) / 2) = floor(x / 2w)``, the counts are the
    same as with the wider bins from the start. So a histogram depends only on the numbers seen, not on their order or
    batches.

    Attributes:
        counts: int64, (2, bins), on the CPU: of the negative numbers by magnitude, then of the positive ones. Bin ``i``
            holds magnitudes from ``i * width`` up to, but not including, ``(i + 1) * width``.
        total: the number of numbers seen; the zeros among them are in no bin.
        exponent: the width is ``2**exponent``; None if all numbers are zero.
        extremes: the smallest and the largest number.
    """

    counts: Tensor
    total: int
    exponent: int | None
    extremes: Extremes

    @classmethod
    def of(cls, x: Tensor, bins: int) -> HistogramCounts | None:
        """Count the elements of a tensor; None if it has no elements, or is not floating.

        Args:
            x: any shape.
            bins: the number of bins on each side of zero; a power of two.

        Raises:
            CalibrationError: if the tensor holds NaN or Inf.
        """
        extremes = Extremes.of(x)
        if extremes is None:
            return None
        largest = max(-extremes.low, extremes.high)
        # The smallest width that gives the largest magnitude a bin.
        exponent = max(math.frexp(largest)[1] - (bins.bit_length() - 1), _MIN_EXPONENT) if largest else None
        counts = torch.zeros(2 * bins, dtype=torch.int64)
        if exponent is not None:
            for values in torch.split(x.flatten(), _BLOCK):
                counts += _count(values.double(), exponent, bins).cpu()
        return cls(counts.reshape(2, bins), x.numel(), exponent, extremes)

    def merged(self, other: HistogramCounts) -> HistogramCounts:
        """Return the histogram of the numbers of both, which must have the same number of bins."""
        exponent = max((e for e in (self.exponent, other.exponent) if e is not None), default=None)
        counts = self._widened(exponent) + other._widened(exponent)
        return HistogramCounts(counts, self.total + other.total, exponent, self.extremes.merged(other.extremes))

    def occupied(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the bins that are not empty.

        Returns:
            lower bounds, upper bounds, and counts of the bins: float64, each (1, bins).
        """
        bins = self.counts.shape[1]
        edges = (torch.arange(bins + 1, dtype=torch.float64) * self._width).clamp(max=torch.finfo(torch.float64).max)
        lower, upper = torch.cat([-edges[1:], edges[:-1]]), torch.cat([-edges[:-1], edges[1:]])
        counts = self.counts.flatten()
        some = counts > 0
        return lower[some].unsqueeze(0), upper[some].unsqueeze(0), counts[some].double().unsqueeze(0)

    def inner_range(self, share: Fraction, *, symmetric: bool) -> Extremes:
        """Return the narrowest range around zero that holds at least this share of the numbers, to the width of a bin.

        Each end is the outer bound of a bin, or the extreme if that is closer to zero. If the range would be zero
        alone, the extremes are returned.

        Args:
            share: the share inside the range: above 0, at most 1.
            symmetric: True for two ends of equal magnitude. False for two ends that each leave out at most half of the
                excluded numbers.
        """
        spare = math.floor(self.total * (1 - share))
        if symmetric:
            negative = positive = self._limit(self.counts.sum(0), spare)
        else:
            negative, positive = (self._limit(side, spare // 2) for side in self.counts)
        if not negative and not positive:
            return self.extremes
        return Extremes(max(-negative, self.extremes.low), min(positive, self.extremes.high))

    @property
    def _width(self) -> float:
        return 0.0 if self.exponent is None else 2.0**self.exponent

    def _limit(self, counts: Tensor, spare: int) -> float:
        """Return the outer bound of the first bin with at most `spare` numbers beyond it; 0 if `spare` covers all."""
        beyond = counts.sum() - counts.cumsum(0)
        if int(counts.sum()) <= spare:
            return 0.0
        return (int((beyond > spare).sum()) + 1) * self._width

    def _widened(self, exponent: int | None) -> Tensor:
        """Return the counts with bins of another width, which must not be smaller."""
        if self.exponent is None or exponent is None:
            return self.counts
        bins = self.counts.shape[1]
        together = min(1 << (exponent - self.exponent), bins)
        return F.pad(self.counts.reshape(2, -1, together).sum(2), (0, bins - bins // together))


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


def _count(values: Tensor, exponent: int, bins: int) -> Tensor:
    """Count the nonzero float64 values in each bin: int64, (2 * bins,)."""
    # Scale in two steps, as a single factor may be beyond the range of float64. Only results below 1 are rounded.
    first = -exponent // 2
    index = values.abs().mul_(2.0**first).mul_(2.0 ** (-exponent - first)).to(torch.int64)
    counts = index.add_(values > 0, alpha=bins).bincount(minlength=2 * bins)
    counts[0] -= (values == 0).sum()
    return counts
