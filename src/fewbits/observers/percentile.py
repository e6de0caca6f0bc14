"""`PercentileObserver`: takes scales from a range that leaves the outermost numbers out."""

from __future__ import annotations

from fractions import Fraction

from torch import Tensor

from fewbits.errors import ArgumentError
from fewbits.numerics.affine import extremes, inner_extremes
from fewbits.numerics.params import QuantParams
from fewbits.numerics.search import choose_within
from fewbits.numerics.spec import QuantSpec
from fewbits.observers.counting import CountingObserver
from fewbits.observers.histogram_counts import HistogramCounts


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
        return choose_within(inner_extremes(weight, spec, self._share), extremes(weight, spec), spec)

    def _choose(self, seen: HistogramCounts, spec: QuantSpec) -> QuantParams:
        inner = seen.inner_range(self._share, symmetric=spec.symmetric)
        return choose_within(inner.around_zero(), seen.extremes.around_zero(), spec)
