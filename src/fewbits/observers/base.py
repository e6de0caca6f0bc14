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

    An instance is a recipe: a quantizer makes a fresh copy for each layer. The public attributes of an instance are its
    settings. The private attributes hold what it has seen.

    Attributes:
        needs_data: whether `observe_input` must have seen a layer's inputs before its weight is quantized.
    """

    needs_data: ClassVar[bool] = False

    @abstractmethod
    def observe_weight(self, weight: Tensor, spec: QuantSpec) -> QuantParams:
        """Pick scale and zero point for some rows of a weight.

        The result for a row may depend only on this row and on the inputs observed before: blocks of one weight of a
        checkpoint arrive on several threads, in any order.

        Args:
            weight: finite, (rows, columns): whole rows of the weight's matrix. If one scale serves the whole tensor
                (granularity "tensor"), all rows come at once, in the weight's dtype. Otherwise they come a block at a
                time, in float32 or float64. Do not write to `weight`, and do not keep it: the next block reuses its
                memory.
            spec: the spec of the codes, with ``spec.scale_dtype`` set.

        Returns:
            scales of shape ``spec.scale_shape(rows, columns)`` and dtype ``spec.scale_dtype``, finite and not zero;
            and zero points, integer, of the same shape, in the code range (None if the spec is symmetric).
        """

    @property
    def gathers_chunks(self) -> bool:
        """Whether `observe_chunks` keeps the whole weight in memory."""
        return True

    def observe_chunks(self, chunks: Iterable[Tensor], spec: QuantSpec) -> QuantParams:
        """Pick the one scale and zero point of a weight that comes in chunks, because it may be larger than memory.

        This method joins the chunks. Override it if a summary of each chunk is enough.

        Args:
            chunks: some whole rows each, in order, in the weight's dtype.
            spec: a spec of granularity "tensor", with ``spec.scale_dtype`` set.
        """
        return self.observe_weight(torch.cat(list(chunks)), spec)

    def observe_input(self, x: Tensor) -> None:  # noqa: B027  (an optional part of the interface)
        """Observe one input of the layer, which is floating and has elements.

        Calibration calls this method if `needs_data` is True, or if `input_params` will be called.
        """

    def input_params(self, spec: QuantSpec) -> QuantParams:
        """Pick scale and zero point for inputs like those seen so far.

        Args:
            spec: the spec of their codes: granularity "tensor", no levels.

        Returns:
            scale, (1,), in ``spec.scale_dtype`` (float32 if that is None), positive; and zero point, int32, (1,), or
            None if the spec is symmetric. Both are on the CPU.

        Raises:
            CalibrationError: if no input was seen, or this observer does not observe inputs.
        """
        raise CalibrationError(
            f"{self!r} does not pick scales for inputs; use one that does, such as MinMaxObserver or HistogramObserver"
        )

    def merge(self, other: Observer) -> None:
        """Merge with another copy of this recipe, as if this observer had seen the inputs of both.

        Raises:
            ArgumentError: if `other` has a different recipe.
            CalibrationError: if this kind of observer cannot be merged.
        """
        raise CalibrationError(
            f"{self!r} cannot be merged with another copy; use an observer that can, such as HistogramObserver, or "
            "show all batches to one copy"
        )

    def reset(self) -> None:  # noqa: B027
        """Forget all inputs."""

    def fresh(self: _Self) -> _Self:
        """Return a copy of this recipe that has seen no input."""
        observer = copy.deepcopy(self)
        observer.reset()
        return observer

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in recipe(self).items())})"


def recipe(observer: Observer) -> dict[str, object]:
    """Return the settings of an observer: its public attributes."""
    return {name: value for name, value in vars(observer).items() if not name.startswith("_")}
