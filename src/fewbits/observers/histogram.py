"""`HistogramObserver`: scales from the range with the least expected noise."""

from __future__ import annotations

from torch import Tensor

from fewbits.numerics.noise import expected_noise
from fewbits.numerics.params import QuantParams
from fewbits.numerics.search import choose_for, shares
from fewbits.numerics.spec import QuantSpec
from fewbits.observers.counting import CountingObserver, least_noise
from fewbits.observers.histogram_counts import HistogramCounts

_SHARES = shares(20)


class HistogramObserver(CountingObserver):
    """Weighs what a range clips against how finely it resolves the rest. For inputs with outliers.

    Takes the range with the least expected noise: for every number ``x`` beyond it the square of its distance from
    it, for one inside ``scale**2 / 12``, the mean square of a rounding error, and ``x**2`` if it is so small that it
    becomes zero. (With levels, the distance of the two levels around a number stands in place of the scale.) For
    inputs that is summed over a histogram of all that were seen, each at the middle of its bin; for weights over the
    elements of each group.

    Args:
        bins: how many the histogram has on each side of zero: a power of two from 64 to 65536.
    """

    def observe_weight(self, weight: Tensor, spec: QuantSpec) -> QuantParams:
        """Scale and zero point from the range of least expected noise of each group."""
        choice = choose_for(weight, spec, expected_noise, _SHARES)
        return choice.params

    def _choose(self, seen: HistogramCounts, spec: QuantSpec) -> QuantParams:
        return least_noise(seen, spec, _at_the_middle)


def _at_the_middle(lower: Tensor, upper: Tensor, params: QuantParams, spec: QuantSpec) -> Tensor:
    return expected_noise(lower / 2 + upper / 2, params, spec)
