"""Cut a tensor of any shape into a matrix: one row for each output, one column for each input."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from fewbits.errors import ArgumentError
from fewbits.numerics.dtypes import for_json

#: Elements in one block. A block and its intermediate results fit into a core's cache.
BLOCK_ELEMENTS = 1 << 18

#: The largest number of axes that torch computes with.
MAX_AXES = 64


def _ints(values: Sequence[int]) -> tuple[int, ...]:
    return tuple(map(operator.index, values))


@attrs.frozen(cache_hash=True)
class Layout:
    """How to make a matrix of a tensor: view it as `view`, permute its axes, take the first `row_axes` as rows.

    The rows are all axes that are not inputs, in order. The columns are the input axes, moved last. `view` equals
    `shape`, except for grouped transposed convolutions, whose input axis is first split into (groups, inputs of a
    group).

    >>> Layout.of((64, 3, 7, 7), inputs=(1, 2, 3)).matrix_shape
    (64, 147)
    >>> Layout.of((32, 8, 5), inputs=(0, 2)).permutation
    (1, 0, 2)
    """

    shape: tuple[int, ...] = attrs.field(converter=_ints)
    view: tuple[int, ...] = attrs.field(converter=_ints)
    permutation: tuple[int, ...] = attrs.field(converter=_ints)
    row_axes: int = attrs.field(validator=attrs.validators.instance_of(int))

    def __attrs_post_init__(self) -> None:
        if min(self.shape + self.view, default=0) < 0 or math.prod(self.view) != math.prod(self.shape):
            raise ArgumentError(f"a tensor of shape {self.shape} cannot be viewed as {self.view}")
        if len(self.view) > MAX_AXES:
            raise ArgumentError(f"a view has at most {MAX_AXES} axes, not {len(self.view)}")
        if sorted(self.permutation) != list(range(len(self.view))):
            raise ArgumentError(f"{self.permutation} is not a permutation of the axes of {self.view}")
        if not 0 <= self.row_axes <= len(self.view):
            raise ArgumentError(f"row_axes must lie between 0 and {len(self.view)}, not {self.row_axes!r}")

    @classmethod
    def of(cls, shape: Sequence[int], *, inputs: Sequence[int] = (-1,), view: Sequence[int] | None = None) -> Layout:
        """Build the layout of a tensor of `shape` whose input axes (of `view`, if given) are `inputs`."""
        view = shape if view is None else view
        if any(not -len(view) <= axis < len(view) for axis in inputs) and view:
            raise ArgumentError(f"a tensor of {len(view)} axes has no input axes {tuple(inputs)}")
        columns = [axis % len(view) for axis in inputs] if view else []
        rows = [axis for axis in range(len(view)) if axis not in columns]
        return cls(tuple(shape), tuple(view), (*rows, *columns), len(rows))

    @property
    def rows(self) -> int:
        """The number of rows of the matrix: the product of the axes that are not inputs."""
        return math.prod([self.view[axis] for axis in self.permutation[: self.row_axes]])

    @property
    def columns(self) -> int:
        """The number of columns of the matrix: the product of the input axes."""
        return math.prod([self.view[axis] for axis in self.permutation[self.row_axes :]])

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.rows, self.columns

    @property
    def in_order(self) -> bool:
        """Whether the matrix has its elements in the same order as the tensor."""
        return self.permutation == tuple(range(len(self.view)))

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """Put a (rows, columns) matrix back into the tensor's own shape."""
        if self.in_order:
            return matrix.reshape(self.shape).contiguous()
        permuted = [self.view[axis] for axis in self.permutation]
        inverse = sorted(range(len(self.permutation)), key=self.permutation.__getitem__)
        return matrix.reshape(permuted).permute(inverse).reshape(self.shape).contiguous()

    def permuted(self, tensor: Tensor) -> Tensor:
        """Move the row axes first and the input axes last, without flattening them."""
        if tuple(tensor.shape) != self.shape:
            raise ArgumentError(f"this layout is for shape {self.shape}, not {tuple(tensor.shape)}")
        return tensor.reshape(self.view).permute(self.permutation)

    def to_dict(self) -> dict[str, Any]:
        """Return a description for JSON; ``Layout(**fields)`` reads it."""
        return for_json(self)


@attrs.frozen(eq=False)
class WeightMatrix:
    """A tensor seen as a (rows, columns) matrix. Only rows that are read are copied, and only if strides require it."""

    tensor: Tensor
    layout: Layout

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def blocks(self, size: int = 1) -> Iterator[tuple[int, int, Tensor]]:
        """Yield (first row, row after the last, the rows between as a 2-D tensor in the tensor's dtype).

        Args:
            size: the rows of one block, as a multiple of `block_rows`.
        """
        rows, columns = self.layout.matrix_shape
        step = size * block_rows(columns)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            yield start, stop, self.read(start, stop)

    def read(self, start: int, stop: int) -> Tensor:
        """Return rows `start` to `stop` as a (stop - start, columns) tensor; a view where the strides allow it."""
        permuted = self.layout.permuted(self.tensor)
        shape = permuted.shape[: self.layout.row_axes]
        if len(shape) == 1:
            rows = permuted[start:stop]
        elif permuted.is_contiguous():
            rows = permuted.view(self.layout.matrix_shape)[start:stop]
        else:
            # Several axes make up the rows. Index them, so that only the requested rows are copied.
            index = torch.arange(start, stop, device=permuted.device)
            rows = permuted[torch.unravel_index(index, shape)] if shape else permuted.unsqueeze(0)[start:stop]
        return rows.reshape(stop - start, self.layout.columns)

    def whole(self) -> Tensor:
        """Return the whole matrix; a copy where the strides require one."""
        return self.layout.permuted(self.tensor).reshape(self.layout.matrix_shape)


def index_at(position: int, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the index of the element at this position of a contiguous tensor."""
    index = torch.unravel_index(torch.tensor(position), tuple(shape)) if shape else ()
    return tuple(int(axis) for axis in index)


def block_rows(columns: int) -> int:
    """Return how many rows of `columns` elements make one block (at least one)."""
    return max(1, BLOCK_ELEMENTS // max(1, columns))
