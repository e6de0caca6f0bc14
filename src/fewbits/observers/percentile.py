"""`PercentileObserver`: scales from a range that leaves the outermost numbers out."""

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
    """Leaves a fixed share of the numbers outside the range, whatever their size. For inputs with outliers.

    The range is the narrowest with at least this share of all numbers, zeros included, inside: around zero if the
    spec is symmetric; else with at most half of the others on either side. Where it would be nothing but zero, the
    extremes are taken. For inputs it is read from a histogram of all that were seen, and up to a bin's width wider
    than exact; for weights it is exact, for each group. With the default, only groups of 10,000 elements and more
    (20,000 if asymmetric) leave any of them out.

    Args:
        percentile: the share inside, in percent: above 0, at most 100.
        bins: how many the histogram has on each side of zero: a power of two from 64 to 65536.

    Raises:
        ArgumentError: for values outside what is listed here.
    """

    def __init__(self, percentile: float = 99.99, bins: int = 2048) -> None:
        super().__init__(bins)
        if not isinstance(percentile, (int, float)) or not 0 < percentile <= 100:
            raise ArgumentError(f"percentile must be above 0 and at most 100, not {percentile!r}")
        self.percentile = float(percentile)

    @property
    def _share(self) -> Fraction:
        """What lies inside, as written: 99.99 is 9999/10000."""
        return Fraction(str(self.percentile)) / 100

    def observe_weight(self, weight: Tensor, spec: QuantSpec) -> QuantParams:
        """Scale and zero point from the inner range of each group."""
        return choose_within(inner_extremes(weight, spec, self._share), extremes(weight, spec), spec)

    def _choose(self, seen: HistogramCounts, spec: QuantSpec) -> QuantParams:
        inner = seen.inner_range(self._share, symmetric=spec.symmetric)
        return choose_within(inner.around_zero(), seen.extremes.around_zero(), spec)
