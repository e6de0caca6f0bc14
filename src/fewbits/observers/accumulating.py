"""`AccumulatingObserver`: one that keeps statistics of the inputs, of a size that does not grow with them."""

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
    """Values of which any two of a kind make one that stands for what both have seen, in either order."""

    def merged(self: _S, other: _S) -> _S:
        """The statistics of both."""


_S = TypeVar("_S", bound=Statistics)


class AccumulatingObserver(Observer, Generic[_S]):
    """Keeps one value for all the inputs it has seen, merged with that of each further input.

    Order and batching of the inputs do not matter, and copies that have seen a part each merge into one that has seen
    all, to the bit.
    """

    # A class attribute, so that a subclass may have an __init__ of its own.
    _seen: _S | None = None

    @abstractmethod
    def _statistics(self, x: Tensor) -> _S | None:
        """The statistics of one input; None if there is nothing in it to observe."""

    @abstractmethod
    def _choose(self, seen: _S, spec: QuantSpec) -> QuantParams:
        """Scale and zero point for inputs with these statistics; the `scale_dtype` of the spec is settled."""

    def observe_input(self, x: Tensor) -> None:
        """Take in one input. What is not floating is passed over.

        Raises:
            CalibrationError: if it holds NaN or Inf.
        """
        self._take_in(self._statistics(x.detach()))

    def input_params(self, spec: QuantSpec) -> QuantParams:
        """Scale and zero point for inputs like those seen so far, as `Observer.input_params` has it."""
        check_input_spec(spec)
        if self._seen is None:
            raise nothing_seen(self)
        return self._choose(self._seen, spec.for_dtype(torch.float32))

    def merge(self, other: Observer) -> None:
        """Take in what another copy of this recipe has seen.

        Raises:
            ArgumentError: if the other one is of another recipe.
        """
        if not isinstance(other, type(self)) or type(self) is not type(other) or recipe(other) != recipe(self):
            raise ArgumentError(f"{self!r} cannot take in what {other!r} has seen; they must be of one recipe")
        self._take_in(other._seen)

    def reset(self) -> None:
        """Forget everything seen so far."""
        self._seen = None

    def _take_in(self, more: _S | None) -> None:
        if more is not None:
            self._seen = more if self._seen is None else self._seen.merged(more)


def check_input_spec(spec: QuantSpec) -> None:
    """Refuse a spec that inputs cannot be rounded with.

    Raises:
        ArgumentError: unless it has one scale for all, and integer codes.
    """
    if spec.granularity != "tensor" or spec.levels is not None:
        raise ArgumentError(f"inputs have one scale and integer codes (granularity 'tensor', no levels), not {spec}")


def nothing_seen(observer: Observer) -> CalibrationError:
    """The error of an observer that is asked about inputs before it has seen any."""
    return CalibrationError(
        f"{observer!r} has seen no input; run data through the layer first: call observe(batches), or pass data="
    )
