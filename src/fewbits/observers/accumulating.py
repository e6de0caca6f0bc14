"""`AccumulatingObserver`: keeps statistics of the inputs, whose size does not grow with the number of inputs."""

from __future__ import annotations

from abc import abstractmethod
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from fewbits.errors import ArgumentError, CalibrationError
from fewbits.numerics.params import QuantParams
from fewbits.numerics.spec import QuantSpec
from fewbits.observers.base import Observer, recipe


class Statistics(Protocol):
    """Mergeable, order-independent statistics."""

    def merged(self: _S, other: _S) -> _S:
        """Return the statistics of the inputs of both."""


_S = TypeVar("_S", bound=Statistics)


class AccumulatingObserver(Observer, Generic[_S]):
    """Keeps the merged statistics of all inputs that it has seen.

    Order and batching of the inputs do not matter. Copies that each saw a part of the inputs can be merged; the result
    has the same bits as that of one observer that saw all inputs.
    """

    # A class attribute, so that a subclass may define an __init__ that does not call this class's.
    _seen: _S | None = None

    @abstractmethod
    def _statistics(self, x: Tensor) -> _S | None:
        """Return the statistics of one input; None if the input has nothing to observe."""

    @abstractmethod
    def _choose(self, seen: _S, spec: QuantSpec) -> QuantParams:
        """Choose scale and zero point for inputs with these statistics; the spec has its `scale_dtype` set."""

    def observe_input(self, x: Tensor) -> None:
        """Add one input to the statistics. Inputs that are not floating are ignored.

        Raises:
            CalibrationError: if the input holds NaN or Inf.
        """
        self._take_in(self._statistics(x.detach()))

    def input_params(self, spec: QuantSpec) -> QuantParams:
        """Pick scale and zero point for inputs like those seen so far; see `Observer.input_params`.

        Raises:
            ArgumentError: unless the spec has one scale for the whole tensor, and integer codes.
            CalibrationError: if no input was seen.
        """
        if spec.granularity != "tensor" or spec.levels is not None:
            raise ArgumentError(f"inputs need a spec with granularity 'tensor' and without levels, not {spec}")
        if self._seen is None:
            raise CalibrationError(
                f"{self!r} has seen no input; run data through the layer first: call observe(batches), or pass data="
            )
        return self._choose(self._seen, spec.for_dtype(torch.float32))

    def merge(self, other: Observer) -> None:
        """Add the statistics of another copy of this recipe.

        Raises:
            ArgumentError: if `other` has a different recipe.
        """
        if not isinstance(other, type(self)) or type(self) is not type(other) or recipe(other) != recipe(self):
            raise ArgumentError(f"{self!r} cannot merge {other!r}: the class and arguments must be equal")
        self._take_in(other._seen)

    def reset(self) -> None:
        """Forget all inputs."""
        self._seen = None

    def _take_in(self, more: _S | None) -> None:
        if more is not None:
            self._seen = more if self._seen is None else self._seen.merged(more)
