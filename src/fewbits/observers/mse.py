"""`MSEObserver`: scales with the least mean square error."""

from __future__ import annotations

from torch import Tensor

from fewbits.errors import ArgumentError
from fewbits.numerics.noise import bin_noise, rounding_noise
from fewbits.numerics.params import QuantParams
from fewbits.numerics.search import choose_for, fit, shares
from fewbits.numerics.spec import QuantSpec
from fewbits.observers.counting import CountingObserver, least_noise
from fewbits.observers.histogram_counts import HistogramCounts


class MSEObserver(CountingObserver):
    """Rounds with many scales and keeps the one with the least square error. For weights of few bits.

    For weights, ``steps`` shares of the range of each group are tried, from all of it down to a twentieth, with both
    signs of the scale if the spec is symmetric (a negative one gives the positive elements the lowest code, which has
    no positive counterpart), and with either end narrowed alone if it is not. The best is then fitted to its own
    codes by least squares, ``sum(w * q) / sum(q**2)``, which is kept if it lowers the error. Scales are tried as they
    are stored, and the error is never larger than that of `MinMaxObserver`.

    For inputs, it is the range whose rounding error is least over a histogram of all that were seen, the values of a
    bin spread evenly over it. The scale is positive.

    Args:
        steps: how many shares of a range are tried; at least 2.
        bins: how many the histogram has on each side of zero: a power of two from 64 to 65536.

    Raises:
        ArgumentError: for values outside what is listed here.
    """

    def __init__(self, steps: int = 20, bins: int = 2048) -> None:
        super().__init__(bins)
        if type(steps) is not int or steps < 2:
            raise ArgumentError(f"steps must be an integer from 2 up, not {steps!r}")
        self.steps = steps

    def observe_weight(self, weight: Tensor, spec: QuantSpec) -> QuantParams:
        """Scale and zero point with the least square error of each group."""
        choice = choose_for(weight, spec, rounding_noise, shares(self.steps), mirrored=True)
        fit(choice, weight)
        return choice.params

    def _choose(self, seen: HistogramCounts, spec: QuantSpec) -> QuantParams:
        return least_noise(seen, spec, bin_noise)
