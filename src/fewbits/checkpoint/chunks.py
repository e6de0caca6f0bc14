"""Cut large tensors into chunks, which are read, converted, compared and written one at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator

import attrs

from fewbits.numerics.layout import Layout, block_rows
from fewbits.numerics.spec import QuantSpec
from fewbits.selection.row import LedgerRow

#: Elements of a chunk: enough to make the overhead of a chunk negligible.
CHUNK_ELEMENTS = 1 << 22

#: At multiples of this many rows, codes of any width that are packed along the rows begin a new word.
_ROWS_OF_WORDS = 32


@attrs.frozen
class Chunk:
    """Consecutive elements of one tensor; of a quantized tensor, whole rows of its matrix.

    Attributes:
        row: the ledger row of the whole tensor.
        start: the index of the first element.
        stop: the index after the last element.
    """

    row: LedgerRow
    start: int
    stop: int

    @classmethod
    def whole(cls, row: LedgerRow) -> Chunk:
        """A tensor as one chunk."""
        return cls(row, 0, math.prod(row.shape))

    @property
    def is_first(self) -> bool:
        """Whether it is the first of its tensor."""
        return self.start == 0

    @property
    def is_last(self) -> bool:
        """Whether it is the last of its tensor."""
        return self.stop == math.prod(self.row.shape)

    @property
    def is_whole(self) -> bool:
        """Whether it is all of its tensor."""
        return self.is_first and self.is_last

    @property
    def nbytes(self) -> int:
        """Its bytes in the source."""
        return (self.stop - self.start) * self.row.source_dtype.itemsize

    @property
    def rows(self) -> tuple[int, int]:
        """The first row of a quantized tensor's matrix that is in it, and the one after the last."""
        columns = self.row.layout.columns if self.row.layout is not None else 1
        return self.start // columns, self.stop // columns

    def described(self) -> LedgerRow:
        """Describe the chunk as if it were a tensor of its own."""
        if self.is_whole:
            return self.row
        shape: tuple[int, ...] = (self.stop - self.start,)
        layout = None
        if self.row.layout is not None:
            first, after = self.rows
            layout = Layout.of((after - first, self.row.layout.columns))
            shape = layout.shape
        return attrs.evolve(self.row, shape=shape, layout=layout)


def columns_of(row: LedgerRow) -> int:
    """Return the columns of the matrix that a tensor is measured as: the matrix of its codes, else its last axis."""
    return (row.layout or Layout.of(row.shape)).columns


def chunks(row: LedgerRow, elements: int | None = None, *, start: int = 0) -> Iterator[Chunk]:
    """Yield the chunks of one tensor, in order.

    A tensor whose rows do not lie one after the other is one chunk, and so is an empty one.

    Args:
        row: the tensor's row in the ledger.
        elements: the approximate number of elements of a chunk; None means `CHUNK_ELEMENTS`.
        start: the first element; a chunk of the whole tensor must begin there.
    """
    total = math.prod(row.shape)
    step = chunk_elements(row, CHUNK_ELEMENTS if elements is None else elements)
    for first in range(start, max(total, 1), step):
        yield Chunk(row, first, min(first + step, total))


def chunk_elements(row: LedgerRow, elements: int) -> int:
    """Compute the elements of each chunk but the last, for about `elements` of them."""
    total = max(1, math.prod(row.shape))
    if row.layout is None:
        return min(total, elements)
    if not row.layout.in_order:
        return total
    # Whole blocks, so that sums over chunks are bit-identical to sums over the whole tensor.
    rows = block_rows(row.layout.columns)
    if isinstance(row.spec, QuantSpec) and (not row.spec.symmetric or row.spec.scale_bits is not None):
        rows = math.lcm(rows, _ROWS_OF_WORDS)
    step = rows * row.layout.columns
    return min(total, step * max(1, elements // step))
