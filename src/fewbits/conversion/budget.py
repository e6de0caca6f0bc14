"""How much memory a conversion from disk to disk takes, and how it is cut to stay within a limit.

The figures were set above what `/proc` said of conversions with fixed chunks. They are no proof: slow tests hold
processes to limits that are settled with them.
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
from fewbits.selection.ledger import Ledger, LedgerRow

#: Bytes that a process takes for more threads, buffers of files, and what torch sets up when it is first used.
_FIXED = 112 << 20
#: Bytes of everything that is known of one tensor: its rows in ledger and header, as objects and as JSON.
_PER_TENSOR = 20 << 10
#: Bytes for each element of the blocks that are quantized at a time, in float32, as codes, and in between.
_PER_ELEMENT = 4 * 24
#: Bytes for each element of the block that is compared with its source, in float64.
_PER_COMPARED = 14 * 8
#: Bytes for each element of the block of an FP8 weight that is dequantized: codes, indices, numbers, scales, products.
_PER_DEQUANTIZED = 32
#: Copies in float32 of a weight that has to be seen as a whole.
_WHOLE_COPIES = 4


@attrs.frozen
class Budget:
    """How a conversion is cut.

    Attributes:
        threads: that work at a time.
        chunk_elements: of one chunk.
    """

    threads: int
    chunk_elements: int


@attrs.frozen
class Demand:
    """What a conversion needs memory for.

    Attributes:
        ledger: all tensors.
        observers: by tensor name.
        by_rows: whether the scheme makes of some rows what it makes of them in the whole weight.
        measuring: whether the result is compared with the source.
        gathered: bytes that reading any of a tensor takes, by its name, where it does not lie in order in its file.
    """

    ledger: Ledger
    observers: Mapping[str, Observer]
    by_rows: bool
    measuring: bool
    gathered: Mapping[str, int] = attrs.field(factory=dict)

    def sees_whole(self, row: LedgerRow) -> bool:
        """Whether a weight has to be in memory as a whole."""
        if row.layout is None or not isinstance(row.spec, QuantSpec):
            return False
        gathers = self.observers[row.name].gathers_chunks
        return not self.by_rows or not row.layout.in_order or (row.spec.granularity == "tensor" and gathers)

    def needed(self, row: LedgerRow, budget: Budget) -> int:
        """Bytes for the work on one tensor, besides what is needed for all."""
        total = max(1, math.prod(row.shape))
        width = row.dtype.itemsize + row.bytes_after / total
        # Those that are worked on or wait for their turn to be written, and the one that is.
        waiting = 1 if budget.threads == 1 else budget.threads + 2
        reading = _PER_DEQUANTIZED * min(total, BLOCK_ELEMENTS) * (row.dequantized_from is not None)
        once = self.gathered.get(row.name, 0)
        if self.sees_whole(row):
            return int(once + total * (waiting * width + budget.threads * _WHOLE_COPIES * 4) + budget.threads * reading)
        block = min(total, max(BLOCK_ELEMENTS, row.layout.columns if row.layout is not None else 1))
        working = (_PER_ELEMENT + _PER_COMPARED * self.measuring) * block if row.spec is not None else 0
        pieces = waiting * chunks.chunk_elements(row, budget.chunk_elements) * width
        return int(once + pieces + budget.threads * (reading + working))

    def largest(self, budget: Budget) -> LedgerRow:
        """The tensor that needs most."""
        return max(self.ledger.stored, key=lambda row: self.needed(row, budget))

    def total(self, budget: Budget) -> int:
        """Bytes for everything."""
        return _FIXED + _PER_TENSOR * len(self.ledger) + self.needed(self.largest(budget), budget)


def settle(demand: Demand, output: Output, threads: int) -> Budget:
    """Cut a conversion so that it stays within the limit of its output: smaller chunks first, then fewer threads.

    Raises:
        ArgumentError: if nothing would; it names the tensor that needs most, and the least limit that would do.
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
            whole = ", which is needed as a whole" if gathered or demand.sees_whole(row) else ""
            advice = ", or exclude it" if whole and not gathered else ""
            raise ArgumentError(
                f"max_memory is {output.max_memory:,} bytes, and at least {least:,} are needed: "
                f"{least - demand.needed(row, budget):,} for the program and all that is known of tensors, and "
                f"{demand.needed(row, budget):,} for the work on {row.name}, shape {row.shape}, "
                f"{dtype_name(row.dtype)}, {row.fate}{whole}; raise the limit{advice}"
            )
    return budget
