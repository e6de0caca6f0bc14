"""`MovingAverageMinMaxObserver`: takes scales of inputs from the averaged extremes of the batches."""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.errors import ArgumentError
from fewbits.numerics.affine import choose_params
from fewbits.numerics.params import QuantParams
from fewbits.numerics.quantize import min_max
from fewbits.numerics.spec import QuantSpec
from fewbits.observers.accumulating import check_input_spec, nothing_seen
from fewbits.observers.base import Observer
from fewbits.observers.extremes import Extremes


class MovingAverageMinMaxObserver(Observer):
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
        self._average: Extremes | None = None

    def observe_weight(self, weight: Tensor, spec: QuantSpec) -> QuantParams:
        """Pick scale and zero point from the extremes of each group."""
        return min_max(weight, spec)

    def observe_input(self, x: Tensor) -> None:
        """Move the averages towards the extremes of one batch. Inputs that are not floating are ignored.

        Raises:
            CalibrationError: if the batch holds NaN or Inf.
        """
        latest, before = Extremes.of(x.detach()), self._average
        if latest is None or before is None:
            self._average = latest or before
            return
        weight = self.averaging_constant
        # Weigh each extreme before adding them: the difference of two extremes may overflow.
        low = (1 - weight) * before.low + weight * latest.low
        self._average = Extremes(low, (1 - weight) * before.high + weight * latest.high)

    def input_params(self, spec: QuantSpec) -> QuantParams:
        """Pick scale and zero point from the averaged extremes; see `Observer.input_params`."""
        check_input_spec(spec)
        if self._average is None:
            raise nothing_seen(self)
        return choose_params(*self._average.around_zero(), spec.for_dtype(torch.float32))

    def reset(self) -> None:
        """Forget all inputs."""
        self._average = None
