"""`InputStatistics`: sums over the inputs of a layer, for strategies that weigh errors by what the inputs look like."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from fewbits.errors import ArgumentError, CalibrationError
from fewbits.rounding.linear_algebra import product

_Derived = TypeVar("_Derived")

#: What a strategy needs to know of a layer's inputs; each kind includes the kinds before it.
Needs = Literal["nothing", "mean_square", "second_moment", "cross_moment"]


def has_second_moment(needs: Needs) -> bool:
    """Tell whether these statistics include the second moment of the inputs."""
    return needs in ("second_moment", "cross_moment")


#: Inputs are added in blocks of this many, whatever the size of the batches. So batches do not change any sum.
_BLOCK = 256


class InputStatistics:
    """Sums over the inputs of some rows of a weight.

    The result has the same bits for any division of the same inputs into batches, and for any number of threads.

    Args:
        columns: the size of one input.
        needs: which sums to keep.
    """

    def __init__(self, columns: int, needs: Needs) -> None:
        self.columns, self.needs, self.count = columns, needs, 0
        shape = (columns,) if needs == "mean_square" else (columns, columns)
        self._moment = torch.zeros(shape)
        self._cross = torch.zeros(shape) if needs == "cross_moment" else None
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._derived: dict[Hashable, Any] = {}

    def add(self, x: Tensor, reference: Tensor | None = None) -> None:
        """Add inputs.

        Args:
            x: (inputs, columns), floating: what the layer gets in the model that is being quantized.
            reference: the inputs of the same layer in the float model, in the same order; None where they are unknown
                (as for an expert that gets other tokens), or the same.

        Raises:
            ArgumentError: if the shapes do not fit.
            CalibrationError: if an input holds NaN or Inf.
        """
        if x.dim() != 2 or x.shape[1] != self.columns:
            raise ArgumentError(f"inputs must be (inputs, {self.columns}), not {tuple(x.shape)}")
        if reference is not None and reference.shape != x.shape:
            raise ArgumentError(f"reference must be {tuple(x.shape)}, as the inputs are, not {tuple(reference.shape)}")
        x = x.detach().to("cpu", torch.float32)
        # The sum is faster to look at; it may overflow where all inputs are finite.
        if not bool(torch.isfinite(x.sum())) and not bool(torch.isfinite(x).all()):
            raise CalibrationError("they hold NaN or Inf; check the data, or run the model in float32")
        paired = x if reference is None else reference.detach().to("cpu", torch.float32)
        self.count += len(x)
        self._derived.clear()
        self._pending.append((x, paired))
        if sum(len(part) for part, _ in self._pending) >= _BLOCK:
            inputs, references = (torch.cat(parts) for parts in zip(*self._pending, strict=True))
            whole = len(inputs) // _BLOCK * _BLOCK
            for start in range(0, whole, _BLOCK):
                self._add_block(inputs[start : start + _BLOCK], references[start : start + _BLOCK])
            # A copy, so that the rest does not keep the whole batch in memory.
            self._pending = [(inputs[whole:].clone(), references[whole:].clone())] if whole < len(inputs) else []

    def derived(self, key: Hashable, make: Callable[[InputStatistics], _Derived]) -> _Derived:
        """Return what a strategy makes of these statistics; make it once for all weights that share them.

        Args:
            key: names the strategy and its settings.
            make: makes it. Not called again until inputs are added.
        """
        if key not in self._derived:
            self._derived[key] = make(self)
        result: _Derived = self._derived[key]
        return result

    @property
    def mean_square(self) -> Tensor:
        """The mean square of each input, float64, (columns,)."""
        moment = self._finished()._moment
        return (moment.diagonal() if moment.dim() == 2 else moment).double() / self.count

    @property
    def second_moment(self) -> Tensor:
        """The mean of ``x x^T``, float64, (columns, columns).

        Raises:
            ArgumentError: if only the mean square was asked for.
        """
        if self._moment.dim() != 2:
            raise ArgumentError("these statistics hold only the mean square of each input")
        return self._finished()._moment.double() / self.count

    @property
    def cross_moment(self) -> Tensor:
        """The mean of ``reference x^T``, float64, (columns, columns).

        Raises:
            ArgumentError: if it was not asked for.
        """
        finished = self._finished()
        if finished._cross is None:
            raise ArgumentError("these statistics do not relate inputs to those of the float model")
        return finished._cross.double() / self.count

    def output_power(self, rows: Tensor) -> float:
        """Return the sum over rows w, (rows, columns), of ``|w x|^2``, added up over all inputs x.

        Raises:
            ArgumentError: if only the mean square was asked for.
        """
        power = float((product(rows, self.second_moment) * rows).double().sum()) * self.count
        return max(0.0, power)  # rounding may give less

    def _finished(self) -> InputStatistics:
        """Return statistics that include the inputs that do not fill a block; later inputs can still be added."""
        if not self.count:
            raise CalibrationError("no input was seen")
        if not self._pending:
            return self
        finished = InputStatistics.__new__(InputStatistics)
        finished._moment = self._moment.clone()
        finished._cross = None if self._cross is None else self._cross.clone()
        finished._add_block(*(torch.cat(parts) for parts in zip(*self._pending, strict=True)))
        return finished

    def _add_block(self, x: Tensor, reference: Tensor) -> None:
        if self._moment.dim() == 1:
            self._moment += x.square().sum(0)
            return
        self._moment.addmm_(x.mT, x)
        if self._cross is not None:
            self._cross.addmm_(reference.mT, x)
