"""`HistogramCounts`: how many numbers of each size were seen, whatever the order they came in."""

from __future__ import annotations

import math
from fractions import Fraction

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.observers.extremes import Extremes

#: The exponent of the smallest float64 there is.
_MIN_EXPONENT = -1074

#: Elements that are counted at a time: in float64, they and their bins fit a core's own cache.
_BLOCK = 1 << 14


@attrs.frozen(eq=False)
class HistogramCounts:
    """A histogram whose bins are of one width, a power of two, and begin at zero.

    The width is the smallest with which the largest magnitude seen falls into a bin. When a larger one comes, bins are
    merged in pairs until it does; as ``floor(floor(x / w) / 2) = floor(x / 2w)``, the counts are then what they would
    have been with the wider bins from the start. So a histogram depends on what was seen, not on the order or the
    batches it came in.

    Attributes:
        counts: int64, (2, bins), on the CPU: of the negative numbers by magnitude, then of the positive ones. Bin ``i``
            holds magnitudes from ``i * width`` up to, but not including, ``(i + 1) * width``.
        zeros: how many numbers were zero; they are in no bin.
        exponent: the width is ``2**exponent``; None while all numbers are zero.
        extremes: the smallest and the largest number.
    """

    counts: Tensor
    zeros: int
    exponent: int | None
    extremes: Extremes

    @classmethod
    def of(cls, x: Tensor, bins: int) -> HistogramCounts | None:
        """Count the elements of a tensor; None if it has none, or they are not floating.

        Args:
            x: any shape.
            bins: how many on each side of zero; a power of two.

        Raises:
            CalibrationError: if it holds NaN or Inf.
        """
        extremes = Extremes.of(x)
        if extremes is None:
            return None
        largest = max(-extremes.low, extremes.high)
        exponent = _exponent(largest, bins) if largest else None
        counts = torch.zeros(2 * bins, dtype=torch.int64)
        if exponent is not None:
            for values in torch.split(x.flatten(), _BLOCK):
                counts += _count(values.double(), exponent, bins).cpu()
        counts = counts.reshape(2, bins)
        return cls(counts, x.numel() - int(counts.sum()), exponent, extremes)

    @property
    def total(self) -> int:
        """How many numbers were seen."""
        return self.zeros + int(self.counts.sum())

    def merged(self, other: HistogramCounts) -> HistogramCounts:
        """The histogram of what both have seen. They must have the same number of bins."""
        exponent = max((e for e in (self.exponent, other.exponent) if e is not None), default=None)
        counts = self._widened(exponent) + other._widened(exponent)
        return HistogramCounts(counts, self.zeros + other.zeros, exponent, self.extremes.merged(other.extremes))

    def occupied(self) -> tuple[Tensor, Tensor, Tensor]:
        """The bins that are not empty.

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
        """A range around zero with at least this share of the numbers inside, as narrow as bins can tell.

        It ends at the outer bound of a bin, or at an extreme if that lies further in. Where it would be nothing but
        zero, it is the range of the extremes.

        Args:
            share: above 0, at most 1.
            symmetric: whether both ends have one magnitude; if not, half of what is left out may lie on either side.
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
        """The outer bound of the first bin that no more than `spare` of these numbers lie beyond; 0 if they all may."""
        beyond = counts.sum() - counts.cumsum(0)
        if int(counts.sum()) <= spare:
            return 0.0
        return (int((beyond > spare).sum()) + 1) * self._width

    def _widened(self, exponent: int | None) -> Tensor:
        """The counts with bins of another width, not smaller."""
        if self.exponent is None or exponent is None:
            return self.counts
        bins = self.counts.shape[1]
        together = min(1 << (exponent - self.exponent), bins)
        return F.pad(self.counts.reshape(2, -1, together).sum(2), (0, bins - bins // together))


def _exponent(largest: float, bins: int) -> int:
    """That of the smallest width with which a magnitude falls into one of the bins."""
    return max(math.frexp(largest)[1] - (bins.bit_length() - 1), _MIN_EXPONENT)


def _count(values: Tensor, exponent: int, bins: int) -> Tensor:
    """The number of float64 values in each bin, but for zeros: int64, (2 * bins,)."""
    # In two steps, as one factor may be beyond the range of float64. Only what ends up below 1 is ever rounded.
    first = -exponent // 2
    index = values.abs().mul_(2.0**first).mul_(2.0 ** (-exponent - first)).to(torch.int64)
    counts = index.add_(values > 0, alpha=bins).bincount(minlength=2 * bins)
    counts[0] -= (values == 0).sum()
    return counts
