"""`SettledObserver`: one that has chosen."""

from __future__ import annotations

from torch import Tensor

from fewbits.numerics.spec import QuantSpec
from fewbits.observers.base import Observer


class SettledObserver(Observer):
    """Gives the one scale and zero point that another observer has chosen for a whole weight."""

    def __init__(self, scale: Tensor, zero_point: Tensor | None) -> None:
        self.scale, self.zero_point = scale, zero_point

    def observe_weight(self, weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
        """What was chosen, whatever the weight."""
        return self.scale, self.zero_point
