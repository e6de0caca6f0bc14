"""`MSEObserver`: takes scales with the least mean square error."""

from __future__ import annotations

from torch import Tensor

from fewbits.errors import ArgumentError
from fewbits.numerics.noise import bin_noise, rounding_noise
from fewbits.numerics.params import QuantParams
from fewbits.numerics.search import choose_for, fit, shares
from fewbits.numerics.spec import QuantSpec
from fewbits.observers.histogram_counts import CountingObserver, HistogramCounts, least_noise


class MSEObserver(CountingObserver):
    """Rounds with many scales and keeps the one with the least square error. For weights of few bits.

    For weights, the observer tries ``steps`` shares of the range of each group, from the whole range down to a
    twentieth. If the spec is symmetric, it tries both signs of the scale: the lowest code has no positive counterpart,
    and a negative scale gives it to the positive elements. If the spec is asymmetric, it also narrows each end alone.
    Then it fits the best scale to its codes by least squares, ``sum(w * q) / sum(q**2)``, and keeps the fitted scale if
    the error is lower. Scales are rounded to their stored dtype before they are tried. The error is never larger than
    with `MinMaxObserver`.

    For inputs, the observer takes the range with the least rounding error over a histogram of all inputs, whose values
    count as spread evenly over their bin. The scale is positive.

    Args:
        steps: the number of shares of a range to try; at least 2.
        bins: the number of bins of the histogram on each side of zero: a power of two from 64 to 65536.

    Raises:
        ArgumentError: for any other value.
    """

    def __init__(self, steps: int = 20, bins: int = 2048) -> None:
        super().__init__(bins)
        if type(steps) is not int or steps < 2:
            raise ArgumentError(f"steps must be an integer from 2 up, not {steps!r}")
        self.steps = steps

    def observe_weight(self, weight: Tensor, spec: QuantSpec) -> QuantParams:
        """Pick scale and zero point with the least square error of each group."""
        choice = choose_for(weight, spec, rounding_noise, shares(self.steps), mirrored=True)
        fit(choice, weight)
        return choice.params

    def _choose(self, seen: HistogramCounts, spec: QuantSpec) -> QuantParams:
        return least_noise(seen, spec, bin_noise)
