"""`Kernel`: the strategy that computes a linear layer, and the weights that it computes with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, Literal, TypeVar

import attrs
import torch
from torch import Tensor

from fewbits.kernels.weight_layouts import WeightLayout

#: How a layer may gain speed: see `fewbits.set_compute`.
Compute = Literal["auto", "exact", "int8"]


_L = TypeVar("_L", bound=WeightLayout)


class Kernel(ABC, Generic[_L]):
    """Computes ``x @ weight.T`` with a weight in one layout.

    Attributes:
        name: The name of the kernel in tables.
        weight_layout: The class of the layout that the kernel reads, `_L`.
        rounds_inputs: Whether the kernel rounds inputs to int8, with one scale per row or the layer's own static scale.
        rounds_weights: Whether the kernel, which needs `rounds_inputs` too, rounds weights in groups or with levels
            to int8 codes, with one scale per row that clips nothing. Integers with one scale per row stay as they are.
    """

    name: ClassVar[str]
    weight_layout: ClassVar[type[Any]]
    rounds_inputs: ClassVar[bool] = False
    rounds_weights: ClassVar[bool] = False

    def prepack(self, weight: WeightLayout, *, reuse_memory: bool = False) -> _L:
        """Convert a weight to the layout that this kernel reads: once per module, before its first forward.

        Args:
            weight: The weight, in any layout.
            reuse_memory: Whether the memory of the weight's words may be overwritten; see `WeightLayout.of`.
        """
        is_there = isinstance(weight, self.weight_layout)
        prepacked: Any = weight if is_there else self.weight_layout.of(weight, reuse_memory=reuse_memory)
        return prepacked  # type: ignore[no-any-return]

    def supports(self, weight: WeightLayout) -> str | None:
        """Say why this kernel cannot compute with a weight, which may be in any layout; None if it can.

        By default, it computes with every weight that its layout can hold.
        """
        reason: str | None = self.weight_layout.refuses(weight)
        return reason

    def takes(self, x: Tensor, rows: int, weight: _L) -> str | None:
        """Say why this kernel does not compute with an input of so many rows; None if it does. Called every time.

        By default, it computes with every input.

        Args:
            x: The input: (..., inputs).
            rows: The number of its rows; for a compiler perhaps a symbol, see `traced`.
            weight: The weight, in the layout of this kernel.
        """
        return None

    def traced_rows(self, weight: _L) -> int:
        """Return the largest number of rows for which `torch.compile` sees the operations of `traced`; 0 for none.

        For so many rows or fewer, `takes` must accept every input.

        Args:
            weight: The weight, in the layout of this kernel.
        """
        return 0

    def traced(self, x: Tensor, weight: _L) -> Tensor:
        """Return the product, in operations that a compiler fuses with each other and with those around them.

        By default, these are the operations of `linear`. A compiler calls this method, and before it `supports`,
        `takes` and `traced_rows`, with fake tensors, whose elements nobody can read. The number of rows may be a
        symbol: compare it only with ``torch.fx.experimental.symbolic_shapes.statically_known_true``.

        Args:
            x: float16, bfloat16 or float32, (rows, inputs).
            weight: The weight, (outputs, inputs), in the layout of this kernel.

        Returns:
            (rows, outputs), in float32 or in the dtype of `x`.
        """
        return self.linear(x, weight)

    @abstractmethod
    def linear(self, x: Tensor, weight: _L) -> Tensor:
        """Return the product. Neither argument is changed, and no gradient is recorded.

        Args:
            x: float16, bfloat16 or float32, (rows, inputs).
            weight: The weight, (outputs, inputs), in the layout of this kernel.

        Returns:
            (rows, outputs), in float32 or in the dtype of `x`.
        """


@attrs.define(eq=False)
class PreparedWeight:
    """A weight in one layout with the kernels that read it: one object, so that threads never mix two layouts.

    Attributes:
        weight: The weight.
        kernels: The kernels that compute with the weight, the most preferred first; none if the reference does.
        description: The string argument of ``torch.ops.fewbits.linear``; None if only the reference is traced.
        columns: How many inputs a row of the weight has.
        device: The device of the weight.
    """

    weight: WeightLayout
    kernels: tuple[Kernel[Any], ...] = ()
    description: str | None = None
    columns: int = attrs.field(init=False)
    device: torch.device = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        # Kept, because a layer needs them at every call.
        self.columns, self.device = self.weight.layout.columns, self.weight.scale.device

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors of the weight, in the order of the description."""
        return list(self.weight.tensors().values())


@attrs.define(eq=False)
class TracedWeight:
    """What a compiler sees of a prepared weight: as little as possible, because it checks all of that at every call.

    Attributes:
        buffers: The tensors of the weight, by name, in the order of the description.
        description: The string argument of ``torch.ops.fewbits.linear``.
        holder: The module that holds the weight; its `wrapped` makes the layout.
    """

    buffers: Mapping[str, Tensor]
    description: str
    holder: Any

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors of the weight."""
        return list(self.buffers.values())

    @property
    def weight(self) -> WeightLayout:
        """The weight in its layout."""
        made: WeightLayout = self.holder.wrapped(self.buffers)
        return made
