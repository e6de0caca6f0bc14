"""`Kernel`: the strategy that computes a linear layer, and what it sees of a weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from fewbits.kernels.weight_layouts import WeightLayout
from fewbits.numerics.spec import Spec

#: What a layer may do to be fast: see `fewbits.set_compute`.
Compute = Literal["auto", "exact", "int8"]


class Operand(Protocol):
    """A stored weight, as the reference sees it. `StoredWeight` is one, and so is every `WeightLayout`."""

    @property
    def spec(self) -> Spec:
        """How it is stored."""

    @property
    def input_scale(self) -> Tensor | None:
        """Float32, (1,): the scale of the layer's int8 inputs; None unless the spec has static activations."""

    def operand(self, dtype: torch.dtype) -> Tensor:
        """The weight in its own shape and in `dtype`, to be read only."""

    def centered_codes(self) -> Tensor:
        """Codes less zero points: float64, in the weight's own shape."""

    @property
    def scale(self) -> Tensor:
        """What they are multiplied with, as stored; of a spec with int8 activations (rows, 1) or (1,)."""


_F = TypeVar("_F", bound=WeightLayout)


class Kernel(ABC, Generic[_F]):
    """Computes ``x @ weight.T`` with a weight in one form.

    Attributes:
        name: what it is called in tables.
        form: the class of the form that it reads, `_F`.
        rounds_inputs: whether it rounds `x` to int8, one scale for each row (or the layer's own, if it has one).
    """

    name: ClassVar[str]
    form: ClassVar[type[Any]]
    rounds_inputs: ClassVar[bool] = False

    def prepack(self, weight: WeightLayout, *, reuse_memory: bool = False) -> _F:
        """The weight in the form that this kernel reads: asked once for a module, before its first forward.

        Args:
            weight: in any form.
            reuse_memory: whether the memory of its words may be reused; see `WeightLayout.of`.
        """
        prepared: _F = weight if isinstance(weight, self.form) else self.form.of(weight, reuse_memory=reuse_memory)
        return prepared

    @abstractmethod
    def supports(self, weight: WeightLayout) -> str | None:
        """Why this kernel cannot compute with this weight, in whatever form it is now; None if it can."""

    @abstractmethod
    def takes(self, x: Tensor, rows: int) -> str | None:
        """Why this kernel does not compute with this input of so many rows; None if it does. Asked at every call."""

    @abstractmethod
    def linear(self, x: Tensor, weight: _F) -> Tensor:
        """The product. Neither argument is changed, and no gradient is recorded.

        Args:
            x: float16, bfloat16 or float32, (rows, inputs).
            weight: in the form of this kernel, of (outputs, inputs).

        Returns:
            (rows, outputs), in float32 or in the dtype of `x`.
        """
