"""Estimate the memory of a conversion from disk to disk, and choose chunks and threads that stay within a limit.

The constants lie above the memory that was measured with fixed chunks. They prove nothing: slow tests run conversions
under an enforced limit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import attrs

from fewbits.checkpoint import chunks
from fewbits.checkpoint.output import Output
from fewbits.errors import ArgumentError
from fewbits.numerics.dtypes import dtype_name
from fewbits.numerics.layout import BLOCK_ELEMENTS
from fewbits.numerics.spec import QuantSpec
from fewbits.observers.base import Observer
from fewbits.selection.ledger import Ledger
from fewbits.selection.row import LedgerRow

#: Bytes for further threads, file buffers, and torch's allocations on first use.
_FIXED = 112 << 20
#: Bytes for the metadata of one tensor: its rows in ledger and header, as objects and as JSON.
_PER_TENSOR = 20 << 10
#: Bytes for each element of a block while it is quantized: float32, codes, and intermediate results.
_PER_ELEMENT = 4 * 24
#: Bytes for each element of a block while it is compared with its source, in float64.
_PER_COMPARED = 14 * 8
#: Bytes for each element of a block of an FP8 weight while it is dequantized: codes, indices, values, scales, products.
_PER_DEQUANTIZED = 32
#: Copies in float32 of a weight that is quantized as a whole.
_WHOLE_COPIES = 4


@attrs.frozen
class Budget:
    """Threads and chunk size of a conversion.

    Attributes:
        threads: the number of threads that work at a time.
        chunk_elements: the number of elements in one chunk.
    """

    threads: int
    chunk_elements: int


@attrs.frozen
class Demand:
    """Everything that decides how much memory a conversion needs.

    Attributes:
        ledger: the ledger of all tensors.
        observers: the observer of each quantized tensor, by tensor name.
        by_rows: whether the scheme can convert a few rows of a weight alone; see `TensorEncoder.by_rows`.
        comparing: whether the result is compared with the source.
        gathered: bytes that reading any part of a tensor takes, by tensor name, for tensors that are not contiguous in
            their file.
    """

    ledger: Ledger
    observers: Mapping[str, Observer]
    by_rows: bool
    comparing: bool
    gathered: Mapping[str, int] = attrs.field(factory=dict)

    def sees_whole(self, row: LedgerRow) -> bool:
        """Whether the whole weight must be in memory at once."""
        if row.layout is None or not isinstance(row.spec, QuantSpec):
            return False
        gathers = self.observers[row.name].gathers_chunks
        return not self.by_rows or not row.layout.in_order or (row.spec.granularity == "tensor" and gathers)

    def needed(self, row: LedgerRow, budget: Budget) -> int:
        """Bytes for the work on one tensor."""
        total = max(1, math.prod(row.shape))
        width = row.dtype.itemsize + row.bytes_after / total
        # With threads: one chunk in work on each, one that waits to be written, and one that is written.
        waiting = 1 if budget.threads == 1 else budget.threads + 2
        reading = _PER_DEQUANTIZED * min(total, BLOCK_ELEMENTS) * (row.dequantized_from is not None)
        once = self.gathered.get(row.name, 0)
        if self.sees_whole(row):
            return int(once + total * (waiting * width + budget.threads * _WHOLE_COPIES * 4) + budget.threads * reading)
        block = min(total, max(BLOCK_ELEMENTS, row.layout.columns if row.layout is not None else 1))
        working = (_PER_ELEMENT + _PER_COMPARED * self.comparing) * block if row.spec is not None else 0
        pieces = waiting * chunks.chunk_elements(row, budget.chunk_elements) * width
        return int(once + pieces + budget.threads * (reading + working))

    def largest(self, budget: Budget) -> LedgerRow:
        """The tensor that needs the most memory."""
        return max(self.ledger.stored, key=lambda row: self.needed(row, budget))

    def total(self, budget: Budget) -> int:
        """Bytes for the whole conversion."""
        return _FIXED + _PER_TENSOR * len(self.ledger) + self.needed(self.largest(budget), budget)


def choose_budget(demand: Demand, output: Output, threads: int) -> Budget:
    """Stay within the memory limit of an output: choose smaller chunks first, then fewer threads.

    Raises:
        ArgumentError: if that is not enough; it names the tensor that needs the most, and the smallest possible limit.
    """
    budget = Budget(threads, chunks.CHUNK_ELEMENTS)
    if output.max_memory is None:
        return budget
    while demand.total(budget) > output.max_memory:
        if budget.chunk_elements > BLOCK_ELEMENTS:
            budget = attrs.evolve(budget, chunk_elements=budget.chunk_elements // 2)
        elif budget.threads > 1:
            budget = Budget(budget.threads - 1, chunks.CHUNK_ELEMENTS)
        else:
            row, least = demand.largest(budget), demand.total(budget)
            gathered = row.name in demand.gathered
            whole = ", which must be in memory as a whole" if gathered or demand.sees_whole(row) else ""
            advice = ", or exclude it" if whole and not gathered else ""
            raise ArgumentError(
                f"max_memory is {output.max_memory:,} bytes, and at least {least:,} are needed: "
                f"{least - demand.needed(row, budget):,} for the program and the metadata of all tensors, and "
                f"{demand.needed(row, budget):,} for the work on {row.name}, shape {row.shape}, "
                f"{dtype_name(row.dtype)}, {row.fate}{whole}; raise the limit{advice}"
            )
    return budget
