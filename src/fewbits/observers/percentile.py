"""`PercentileObserver`: takes scales from a range that leaves the outermost numbers out."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from fewbits.errors import ArgumentError
from fewbits.numerics.params import QuantParams
from fewbits.numerics.scales import choose_params, extremes, is_finite_throughout
from fewbits.numerics.spec import QuantSpec
from fewbits.observers.histogram_counts import CountingObserver, HistogramCounts


class PercentileObserver(CountingObserver):
    """Leaves a fixed share of the numbers outside the range, of any size. For inputs with outliers.

    The range is the narrowest one that holds at least this share of all numbers, zeros included. If the spec is
    symmetric, both ends have one magnitude; otherwise at most half of the excluded numbers lie on either side. If the
    range would be zero alone, the extremes replace it.

    For weights the range is exact, for each group. With the default, only groups of at least 10,000 elements (20,000 if
    asymmetric) leave any element out. For inputs the range is read from a histogram of all inputs, and is up to one
    bin's width too wide.

    Args:
        percentile: the share inside the range, in percent: above 0, at most 100.
        bins: the number of bins of the histogram on each side of zero: a power of two from 64 to 65536.

    Raises:
        ArgumentError: for any other value.
    """

    def __init__(self, percentile: float = 99.99, bins: int = 2048) -> None:
        super().__init__(bins)
        if not isinstance(percentile, (int, float)) or not 0 < percentile <= 100:
            raise ArgumentError(f"percentile must be above 0 and at most 100, not {percentile!r}")
        self.percentile = float(percentile)

    @property
    def _share(self) -> Fraction:
        """The share inside the range, as the exact decimal: 99.99 is 9999/10000."""
        return Fraction(str(self.percentile)) / 100

    def observe_weight(self, weight: Tensor, spec: QuantSpec) -> QuantParams:
        """Pick scale and zero point from the inner range of each group."""
        outer, (low, high) = extremes(weight, spec), _inner_ranges(weight, spec, self._share)
        empty = (low == 0) & (high == 0)
        inner = torch.where(empty, outer[0], low), torch.where(empty, outer[1], high)
        return _choose_within(inner, outer, spec)

    def _choose(self, seen: HistogramCounts, spec: QuantSpec) -> QuantParams:
        inner = seen.inner_range(self._share, symmetric=spec.symmetric)
        return _choose_within(inner.around_zero(), seen.extremes.around_zero(), spec)


def _inner_ranges(x: Tensor, spec: QuantSpec, share: Fraction) -> tuple[Tensor, Tensor]:
    """Find the narrowest range around zero that holds this share of each group's elements.

    Symmetric: both ends have one magnitude. Asymmetric: at most half of the excluded elements lie on either side.

    Returns:
        the low and the high ends, in the shape of the scales.
    """
    shape = spec.scale_shape(*x.shape)
    x = x.reshape(1, -1) if spec.granularity == "tensor" else x
    rows, columns = x.shape
    width = spec.width(columns)
    whole = columns // width * width
    # A shorter last group is handled apart, not padded: the padding zeros would count as elements inside the range.
    parts = x[:, :whole].reshape(rows, -1, width), x[:, whole:].unsqueeze(1)
    ends = [_inner_range(part, spec, share) for part in parts if part.numel()]
    low, high = (torch.cat(sides, 1).reshape(shape) for sides in zip(*ends, strict=True))
    return low, high


def _inner_range(groups: Tensor, spec: QuantSpec, share: Fraction) -> tuple[Tensor, Tensor]:
    """Find the ranges of groups of one width, (rows, groups, width)."""
    count = groups.shape[2]
    spare = math.floor(count * (1 - share))
    if spec.symmetric:
        high = groups.abs().kthvalue(count - spare).values
        return -high, high
    low, high = (groups.kthvalue(rank).values for rank in (1 + spare // 2, count - spare // 2))
    return low.clamp(max=0), high.clamp(min=0)


def _choose_within(inner: tuple[Tensor, Tensor], outer: tuple[Tensor, Tensor], spec: QuantSpec) -> QuantParams:
    """Choose scales for the inner ranges; where their first or last code would decode to infinity, the outer ones.

    With two levels of scales, a whole row takes the outer ranges.
    """
    params = choose_params(*inner, spec)
    usable = is_finite_throughout(params, spec)
    if params.row_scale is not None:
        usable = usable.all(1, keepdim=True)
    return params if usable.all() else params.where(usable, choose_params(*outer, spec))
