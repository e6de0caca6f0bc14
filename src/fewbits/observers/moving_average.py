"""`MovingAverageMinMaxObserver`: takes scales of inputs from the averaged extremes of the batches."""

from __future__ import annotations

from fewbits.errors import ArgumentError
from fewbits.observers.base import Observer
from fewbits.observers.extremes import Extremes
from fewbits.observers.min_max import MinMaxObserver


class MovingAverageMinMaxObserver(MinMaxObserver):
    """Averages the extremes of the batches; later batches count more. For inputs with rare outliers.

    The first batch sets the averages to its extremes. Every later batch with the extreme ``x`` changes the average
    ``m`` to ``(1 - c) * m + c * x``, where ``c`` is the averaging constant. The order of the batches matters, so two
    copies cannot be merged. Weights are treated as by `MinMaxObserver`.

    Args:
        averaging_constant: the weight of the latest batch, above 0 and at most 1.

    Raises:
        ArgumentError: for a constant outside that range.
    """

    def __init__(self, averaging_constant: float = 0.01) -> None:
        if not isinstance(averaging_constant, (int, float)) or not 0 < averaging_constant <= 1:
            raise ArgumentError(f"averaging_constant must be above 0 and at most 1, not {averaging_constant!r}")
        self.averaging_constant = float(averaging_constant)

    merge = Observer.merge

    def _take_in(self, more: Extremes | None) -> None:
        if more is None or self._seen is None:
            self._seen = more or self._seen
            return
        # Weigh each extreme before adding them: the difference of two extremes may overflow.
        old, new = 1 - self.averaging_constant, self.averaging_constant
        self._seen = Extremes(old * self._seen.low + new * more.low, old * self._seen.high + new * more.high)
