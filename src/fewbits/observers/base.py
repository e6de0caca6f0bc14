"""`Observer`: the strategy that picks scales and zero points."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from fewbits.errors import CalibrationError
from fewbits.numerics.params import QuantParams
from fewbits.numerics.spec import QuantSpec

_Self = TypeVar("_Self", bound="Observer")


class Observer(ABC):
    """Picks scale and zero point, for a weight or for the inputs of a layer.

    One instance is a recipe: a quantizer makes a fresh copy per layer. The public attributes of an instance are what
    the recipe says, the private ones what it has seen.

    Attributes:
        needs_data: whether `observe_input` must have seen a layer's inputs before its weight is quantized.
    """

    needs_data: ClassVar[bool] = False

    @abstractmethod
    def observe_weight(self, weight: Tensor, spec: QuantSpec) -> QuantParams:
        """Pick scale and zero point for some rows of a weight.

        What is picked for a row depends on this row, and on inputs that were observed, and on nothing else: of a
        checkpoint on disk, blocks of one weight come on several threads, in any order.

        Args:
            weight: (rows, columns), finite, not to be written to, and not to be held: the next rows come in the same
                memory. Whole rows of the matrix it is cut into, in float32 or float64 and a block at a time; where one
                scale serves the whole tensor (granularity "tensor"), all at once and in the weight's own dtype.
            spec: how the codes shall look, with ``spec.scale_dtype`` settled.

        Returns:
            scales of shape ``spec.scale_shape(rows, columns)`` and dtype ``spec.scale_dtype``, finite and not zero;
            and zero points, integer, of the same shape, in the code range (None if the spec is symmetric).
        """

    @property
    def gathers_chunks(self) -> bool:
        """Whether `observe_chunks` holds the whole weight."""
        return True

    def observe_chunks(self, chunks: Iterable[Tensor], spec: QuantSpec) -> QuantParams:
        """Pick the one scale and zero point of a weight that comes in chunks, because it may be larger than memory.

        An observer that needs no more than a summary of them should override this, which brings them together.

        Args:
            chunks: some whole rows each, in order, in the weight's own dtype.
            spec: of granularity "tensor", with ``spec.scale_dtype`` settled.
        """
        return self.observe_weight(torch.cat(list(chunks)), spec)

    def observe_input(self, x: Tensor) -> None:  # noqa: B027  (an optional part of the interface)
        """Look at one input of the layer, floating and with elements.

        Called during calibration, if `needs_data`, or if `input_params` will be asked for.
        """

    def input_params(self, spec: QuantSpec) -> QuantParams:
        """Pick scale and zero point for inputs like those seen so far.

        Args:
            spec: how their codes shall look: granularity "tensor", no levels.

        Returns:
            scale, (1,), in ``spec.scale_dtype`` (float32 if that is None), positive; and zero point, int32, (1,), or
            None if the spec is symmetric. Both are on the CPU.

        Raises:
            CalibrationError: if nothing was seen, or this observer does not look at inputs.
        """
        raise CalibrationError(
            f"{self!r} does not pick scales for inputs; take one that does, such as MinMaxObserver or HistogramObserver"
        )

    def merge(self, other: Observer) -> None:
        """Take in what another copy of this recipe has seen, as if this one had seen it too.

        Raises:
            ArgumentError: if the other one is of another recipe.
            CalibrationError: if this kind of observer cannot do it.
        """
        raise CalibrationError(
            f"{self!r} cannot take in what another copy has seen; take one that counts, such as HistogramObserver, or "
            "show all batches to one copy"
        )

    def reset(self) -> None:  # noqa: B027
        """Forget everything seen so far."""

    def fresh(self: _Self) -> _Self:
        """A copy of this recipe that has seen nothing."""
        observer = copy.deepcopy(self)
        observer.reset()
        return observer

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in recipe(self).items())})"


def recipe(observer: Observer) -> dict[str, object]:
    """What an observer was made with: its public attributes."""
    return {name: value for name, value in vars(observer).items() if not name.startswith("_")}
