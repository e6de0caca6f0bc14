"""`Kernel`: the strategy that computes a linear layer, and what it sees of a weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from fewbits.numerics.spec import Spec


class Operand(Protocol):
    """A stored weight, as a computation sees it. `fewbits.nn.stored.StoredWeight` is one."""

    @property
    def spec(self) -> Spec:
        """How it is stored."""

    @property
    def input_scale(self) -> Tensor | None:
        """Float32, (1,): the scale of the layer's int8 inputs; None unless the spec has static activations."""

    def operand(self, dtype: torch.dtype) -> Tensor:
        """The weight in its own shape and in `dtype`, to be read only."""

    def steps(self) -> tuple[Tensor, Tensor]:
        """The weight as whole numbers and what they are multiplied with.

        Returns:
            codes less zero points, in the weight's own shape, and scales, (rows,) or (1,); both float64.
        """


class Kernel(ABC):
    """Computes ``x @ weight.T + bias`` with a stored weight.

    Attributes:
        name: what it is called in tables.
    """

    name: ClassVar[str]

    @abstractmethod
    def supports(self, weight: Operand, x: Tensor) -> str | None:
        """Why this kernel cannot compute with this weight and this input; None if it can."""

    @abstractmethod
    def linear(self, x: Tensor, weight: Operand, bias: Tensor | None) -> Tensor:
        """The layer's output, in the dtype of `x`. Neither argument is changed.

        Args:
            x: floating, (..., inputs).
            weight: stored from a weight of shape (outputs, inputs).
            bias: (outputs,), or None.
        """
