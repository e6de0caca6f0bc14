"""Chunks: parts of a tensor, each read, converted, compared and written at a time, to limit memory."""

from __future__ import annotations

import math
from collections.abc import Iterator

import attrs

from fewbits.numerics.layout import Layout, block_rows
from fewbits.numerics.spec import QuantSpec
from fewbits.selection.ledger import LedgerRow

#: Default elements per chunk: enough that the fixed cost of a chunk does not matter.
CHUNK_ELEMENTS = 1 << 22

#: Packed zero points begin a new 32-bit word at every multiple of this many rows, for every bit width.
_ZERO_POINT_ROWS = 32


@attrs.frozen
class Chunk:
    """Some elements of one tensor, as they lie in a file; of a quantized one, whole rows of its matrix.

    Attributes:
        row: ledger row of the whole tensor.
        start: index of the first element.
        stop: index after the last element.
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
        """A row of the ledger for a tensor that is no more than this chunk; the tensor's own if it is all of it."""
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
    """Columns of the matrix that a tensor is measured as: that of its codes, else of its last axis."""
    return (row.layout or Layout.of(row.shape)).columns


def chunks(row: LedgerRow, elements: int | None = None, *, start: int = 0) -> Iterator[Chunk]:
    """Yield a tensor's chunks in order, each of about `elements` elements (None: `CHUNK_ELEMENTS`).

    A tensor whose rows do not lie one after the other is one chunk, and so is an empty one.

    Args:
        row: of the tensor.
        elements: of a chunk.
        start: the first element that is wanted; one that a chunk of any size begins with.
    """
    total = math.prod(row.shape)
    step = chunk_elements(row, CHUNK_ELEMENTS if elements is None else elements)
    for first in range(start, max(total, 1), step):
        yield Chunk(row, first, min(first + step, total))


def chunk_elements(row: LedgerRow, elements: int) -> int:
    """How many elements each chunk of a tensor has, but the last, if they are to be about so many."""
    total = max(1, math.prod(row.shape))
    if row.layout is None:
        return min(total, elements)
    if not row.layout.in_order:
        return total
    # Whole blocks, so that sums over chunks add in the same order as sums over the whole tensor.
    rows = block_rows(row.layout.columns)
    if isinstance(row.spec, QuantSpec) and not row.spec.symmetric:
        rows = math.lcm(rows, _ZERO_POINT_ROWS)
    step = rows * row.layout.columns
    return min(total, step * max(1, elements // step))
