"""`HistogramObserver`: takes scales from the range with the least expected noise."""

from __future__ import annotations

from torch import Tensor

from fewbits.numerics.noise import expected_noise
from fewbits.numerics.params import QuantParams
from fewbits.numerics.search import choose_for, shares
from fewbits.numerics.spec import QuantSpec
from fewbits.observers.histogram_counts import CountingObserver, HistogramCounts, least_noise

_SHARES = shares(20)


class HistogramObserver(CountingObserver):
    """Balances clipping against rounding: takes the range with the least expected noise. For inputs with outliers.

    The expected noise is the sum, over all numbers ``x``, of

    - the squared distance from the range, if ``x`` is outside;
    - ``x**2``, if ``x`` is so small that it rounds to zero;
    - otherwise ``scale**2 / 12``, the mean square of a rounding error. With levels, the distance between the two levels
      around ``x`` replaces the scale.

    For weights the sum is over the elements of each group. For inputs it is over a histogram of all inputs, with each
    number at the middle of its bin.

    Args:
        bins: the number of bins of the histogram on each side of zero: a power of two from 64 to 65536.
    """

    def observe_weight(self, weight: Tensor, spec: QuantSpec) -> QuantParams:
        """Pick scale and zero point from the range of least expected noise of each group."""
        return choose_for(weight, spec, expected_noise, _SHARES).params

    def _choose(self, seen: HistogramCounts, spec: QuantSpec) -> QuantParams:
        return least_noise(seen, spec, _at_the_middle)


def _at_the_middle(lower: Tensor, upper: Tensor, params: QuantParams, spec: QuantSpec) -> Tensor:
    return expected_noise(lower / 2 + upper / 2, params, spec)
