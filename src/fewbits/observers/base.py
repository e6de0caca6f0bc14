"""`Observer`: the strategy that picks scales and zero points."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import ClassVar, TypeVar

from torch import Tensor

from fewbits.numerics.spec import QuantSpec

_Self = TypeVar("_Self", bound="Observer")


class Observer(ABC):
    """Picks scale and zero point for a weight. One instance is a recipe: a quantizer makes a fresh copy per layer.

    Attributes:
        needs_data: whether `observe_input` must have seen a layer's inputs before its weight is quantized.
    """

    needs_data: ClassVar[bool] = False

    @abstractmethod
    def observe_weight(self, weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
        """Pick scale and zero point for some rows of a weight.

        Args:
            weight: (rows, columns), finite, not to be written to; whole rows of the matrix it is cut into. They come in
                float32 or float64 and a block at a time, in order; where one scale serves the whole tensor
                (granularity "tensor"), all at once and in the weight's own dtype.
            spec: how the codes shall look, with ``spec.scale_dtype`` settled.

        Returns:
            scale, of shape ``spec.scale_shape(rows, columns)`` and dtype ``spec.scale_dtype``, finite and not zero;
            and zero point, integer, of the same shape, in the code range (None if the spec is symmetric).
        """

    def observe_input(self, x: Tensor) -> None:  # noqa: B027  (an optional part of the interface)
        """Look at one input of the layer. Called during calibration, and only if `needs_data`."""

    def reset(self) -> None:  # noqa: B027
        """Forget everything seen so far."""

    def fresh(self: _Self) -> _Self:
        """A copy of this recipe that has seen nothing."""
        observer = copy.deepcopy(self)
        observer.reset()
        return observer
