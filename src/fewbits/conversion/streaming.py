"""`Streaming`: chunks of a checkpoint on disk, read, converted, and compared with what they were made from."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import attrs
import torch
from torch import Tensor

from fewbits.checkpoint.chunks import Chunk, chunks
from fewbits.checkpoint.codec import Value
from fewbits.checkpoint.raw import tensor_bytes
from fewbits.conversion.budget import Budget, Demand
from fewbits.conversion.job import Conversion, named
from fewbits.conversion.pool import in_order
from fewbits.errors import NumericsError
from fewbits.numerics.metrics import Tally, unit_of
from fewbits.numerics.quantize import check_chosen, check_finite
from fewbits.numerics.spec import CastSpec, QuantSpec
from fewbits.observers.base import Observer
from fewbits.selection.ledger import Ledger, LedgerRow
from fewbits.sources.file import FileSource


@attrs.frozen(eq=False)
class Converted:
    """A chunk that is ready to be written.

    Attributes:
        chunk: which.
        value: its stored form.
        source: SHA-256 of its bytes as they were read.
        tally: how its stored form compares with it; None if that was not asked for.
    """

    chunk: Chunk
    value: Value
    source: str
    tally: Tally | None


@attrs.frozen(eq=False)
class Streaming:
    """How the chunks of one source are converted."""

    source: FileSource
    demand: Demand
    conversion: Conversion
    budget: Budget

    def convert(self, ledger: Ledger, done: Mapping[str, int]) -> Iterator[Converted]:
        """Convert everything in a ledger, in its order, on as many threads as the budget has.

        Args:
            ledger: all of it, or that of one file.
            done: how many elements of a tensor are there already, by its name.
        """
        return in_order(self._tasks(ledger, done), self.budget.threads)

    def source_digest(self, chunk: Chunk) -> str:
        """SHA-256 of a chunk's bytes as they are now."""
        # Bytes are read as they lie, however they are quantized.
        flat = attrs.evolve(chunk.row, fate="kept", spec=None, layout=None)
        found = hashlib.sha256()
        for start in range(chunk.start, chunk.stop, self.budget.chunk_elements):
            part = Chunk(flat, start, min(start + self.budget.chunk_elements, chunk.stop))
            tensor = self.source.read_chunk(flat.name, part)
            found.update(tensor_bytes(tensor))
        return found.hexdigest()

    def _tasks(self, ledger: Ledger, done: Mapping[str, int]) -> Iterator[Callable[[], Converted]]:
        for row in ledger.stored:
            missing = list(self._chunks(row, done.get(row.name)))
            if missing:
                pieces = list(self._chunks(row))
                observer = self._observer(row, pieces)
                unit = self._unit(row, pieces)
                for chunk in missing:
                    yield partial(self._convert, chunk, observer, unit)

    def _chunks(self, row: LedgerRow, done: int | None = None) -> Iterator[Chunk]:
        """Those that are not done. A scheme of somebody else's may need to see all of a weight."""
        if done == math.prod(row.shape):
            return iter([])
        if self.conversion.by_rows or row.layout is None:
            return chunks(row, self.budget.chunk_elements, start=done or 0)
        return iter([Chunk.whole(row)])

    def _observer(self, row: LedgerRow, pieces: Sequence[Chunk]) -> Observer | None:
        """The observer of a row, which has chosen already if one scale serves chunks that it will not see together."""
        observer = self.demand.observers.get(row.name)
        if observer is None or len(pieces) == 1 or not isinstance(row.spec, QuantSpec):
            return observer
        if row.spec.granularity != "tensor" or row.layout is None:
            return observer
        spec = row.spec.for_dtype(row.dtype).weight_only()
        shape = (row.layout.rows, row.layout.columns)
        seen = (self._finite(chunk) for chunk in pieces)
        return FixedObserver(*named(row, lambda: check_chosen(observer.observe_chunks(seen, spec), spec, shape)))

    def _finite(self, chunk: Chunk) -> Tensor:
        tensor = self.source.read_chunk(chunk.row.name, chunk)
        check_finite(tensor, first=chunk.start, shape=chunk.row.shape)
        return tensor

    def _unit(self, row: LedgerRow, pieces: Sequence[Chunk]) -> float:
        """What to take sums of squares in; only of float64 tensors this reads the source."""
        if not self.demand.measuring or row.spec is None or row.dtype != torch.float64:
            return 1.0
        return unit_of(self.source.read_chunk(row.name, chunk) for chunk in pieces)

    def _convert(self, chunk: Chunk, observer: Observer | None, unit: float) -> Converted:
        row = chunk.row
        tensor = self.source.read_chunk(row.name, chunk)
        read = hashlib.sha256(tensor_bytes(tensor)).hexdigest()
        if row.spec is None:
            return Converted(chunk, tensor, read, None)
        value = named(row, lambda: self._make(chunk, tensor, observer))
        tally = None
        if self.demand.measuring:
            tally = Tally(unit)
            tally.add(tensor, value)
        return Converted(chunk, value, read, tally)

    def _make(self, chunk: Chunk, tensor: Tensor, observer: Observer | None) -> Value:
        try:
            return self.conversion.make(chunk.described(), tensor, observer)
        except NumericsError:
            # That says where in the chunk; where in the tensor is what people can look up.
            spec = chunk.row.spec
            check_finite(tensor, first=chunk.start, shape=chunk.row.shape)
            if isinstance(spec, CastSpec):
                check_finite(tensor, spec.dtype, first=chunk.start, shape=chunk.row.shape)
            raise


class FixedObserver(Observer):
    """Gives the one scale and zero point that another observer has chosen for a whole weight."""

    def __init__(self, scale: Tensor, zero_point: Tensor | None) -> None:
        self.scale, self.zero_point = scale, zero_point

    def observe_weight(self, weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
        """What was chosen, whatever the weight."""
        return self.scale, self.zero_point
