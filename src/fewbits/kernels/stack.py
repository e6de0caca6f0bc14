"""`Stack`: a weight that other forwards read in parts, such as one expert, or one projection of several."""

from __future__ import annotations

import math
from typing import Any

import attrs

from fewbits.kernels.base import Kernel
from fewbits.kernels.row_parts import row_part
from fewbits.kernels.weight_layouts import PackedInt32, WeightLayout
from fewbits.numerics.layout import Layout


@attrs.frozen
class Stack:
    """A matrix or a stack of matrices, by the rows of its matrix of codes.

    Attributes:
        shape: (outputs, inputs), or (matrices, outputs, inputs).
        start: the first of its rows in the matrix of codes of the whole weight.
        is_transposed: whether the tensor has its last two axes in the order (inputs, outputs).
    """

    shape: tuple[int, ...]
    start: int = 0
    is_transposed: bool = False

    @classmethod
    def of(cls, layout: Layout) -> Stack | None:
        """Return the stack that a weight is; None for other weights, such as those of convolutions."""
        axes, order = len(layout.shape), layout.permutation
        if axes not in (2, 3) or layout.view != layout.shape or layout.row_axes != axes - 1 or 0 in layout.shape:
            return None
        if order[-1] < axes - 2:  # the inputs are an axis over matrices
            return None
        return cls(tuple(layout.shape[axis] for axis in order), is_transposed=not layout.in_order)

    @property
    def first(self) -> Stack:
        """The first matrix, which tells the kernels for all."""
        return attrs.evolve(self, shape=self.shape[-2:])

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        *stack, outputs, inputs = self.shape
        return (*stack, inputs, outputs) if self.is_transposed else self.shape

    def strides_in(self, whole: Stack) -> tuple[int, ...]:
        """Return the strides that the tensor has as a part of a contiguous tensor."""
        outputs, inputs = whole.shape[-2:]
        lead = (outputs * inputs,) * (len(self.shape) - 2)
        of_outputs, of_inputs = (1, outputs) if whole.is_transposed else (inputs, 1)
        return (*lead, of_inputs, of_outputs) if self.is_transposed else (*lead, of_outputs, of_inputs)

    @property
    def rows(self) -> slice:
        """The rows of the matrix of codes."""
        return slice(self.start, self.start + math.prod(self.shape[:-1]))

    @property
    def transposed(self) -> Stack:
        """The same matrices with their two axes in the other order."""
        return attrs.evolve(self, is_transposed=not self.is_transposed)

    @property
    def height(self) -> int:
        """The rows of codes at an index of the first axis."""
        return math.prod(self.shape[1:-1])

    def part(self, first: int, count: int) -> Stack:
        """Return some matrices, or some rows of a matrix: indices of the first axis of `shape`."""
        return attrs.evolve(self, shape=(count, *self.shape[1:]), start=self.start + first * self.height)

    def matrix(self, index: int) -> Stack:
        """Return one matrix."""
        return attrs.evolve(self, shape=self.shape[1:], start=self.start + index * self.height)


def first_matrix(weight: WeightLayout) -> WeightLayout | None:
    """Return the first matrix of a stack, in the canonical layout; None if the weight is no stack."""
    stack = Stack.of(weight.layout)
    return None if stack is None else row_part(PackedInt32.of(weight), stack.first.rows)


def as_matrix(weight: WeightLayout) -> WeightLayout:
    """Return a weight of any shape as the matrix of its codes, in the same memory."""
    return attrs.evolve(weight, layout=Layout.of(weight.layout.matrix_shape))


def prepack_rows(weight: WeightLayout, kernel: Kernel[Any], *, reuse_memory: bool) -> WeightLayout:
    """Convert a weight that is used in parts of its rows to the layout that a kernel reads.

    Returns:
        the weight in that layout; in the canonical layout if the kernel's cannot be cut between rows.
    """
    stack = Stack.of(weight.layout)
    rows = slice(0, weight.layout.rows) if stack is None else stack.first.rows
    made = kernel.prepack(as_matrix(weight), reuse_memory=reuse_memory)
    return attrs.evolve(made if row_part(made, rows) else PackedInt32.of(made), layout=weight.layout)
