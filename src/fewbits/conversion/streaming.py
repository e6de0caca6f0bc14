"""`Streaming`: reads a checkpoint on disk in chunks, converts each, and compares it with the source."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import attrs
from torch import Tensor

from fewbits.checkpoint.chunks import Chunk, chunks
from fewbits.checkpoint.codec import Value
from fewbits.checkpoint.raw import tensor_bytes
from fewbits.conversion.budget import Budget, Demand
from fewbits.conversion.encoder import TensorEncoder, naming
from fewbits.conversion.pool import in_order
from fewbits.errors import NumericsError
from fewbits.numerics.metrics import Tally
from fewbits.numerics.params import QuantParams
from fewbits.numerics.quantize import check_chosen, check_finite
from fewbits.numerics.spec import CastSpec, QuantSpec
from fewbits.observers.base import Observer
from fewbits.selection.ledger import Ledger, LedgerRow
from fewbits.sources.file import FileSource


@attrs.frozen(eq=False)
class Converted:
    """A chunk that is ready to be written.

    Attributes:
        chunk: its place in its tensor.
        value: its stored form.
        source: SHA-256 of its bytes in the source.
        tally: the comparison with the source, if asked for.
    """

    chunk: Chunk
    value: Value
    source: str
    tally: Tally | None


@attrs.frozen(eq=False)
class Streaming:
    """Converts one source, a chunk at a time."""

    source: FileSource
    demand: Demand
    encoder: TensorEncoder
    budget: Budget

    def convert(self, ledger: Ledger, done: Mapping[str, int]) -> Iterator[Converted]:
        """Convert all tensors of a ledger, in order, on as many threads as the budget allows.

        Args:
            ledger: of all tensors, or those of one file.
            done: how many elements of a tensor to skip, by tensor name: an earlier run has converted them.
        """
        return in_order(self._tasks(ledger, done), self.budget.threads)

    def source_digest(self, chunk: Chunk) -> str:
        """SHA-256 of a chunk's bytes in the source now."""
        # Without a layout, elements are read in the order of the file.
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
                observer = self._observer(row, list(self._chunks(row)))
                for chunk in missing:
                    yield partial(self._convert, chunk, observer)

    def _chunks(self, row: LedgerRow, done: int | None = None) -> Iterator[Chunk]:
        """The chunks from element `done` on; one whole chunk, if the scheme must see all rows."""
        if done == math.prod(row.shape):
            return iter([])
        if self.encoder.by_rows or row.layout is None:
            return chunks(row, self.budget.chunk_elements, start=done or 0)
        return iter([Chunk.whole(row)])

    def _observer(self, row: LedgerRow, pieces: Sequence[Chunk]) -> Observer | None:
        """The observer of a row. If several chunks share one scale, it has chosen that scale from all of them."""
        observer = self.demand.observers.get(row.name)
        if observer is None or len(pieces) == 1 or not isinstance(row.spec, QuantSpec):
            return observer
        if row.spec.granularity != "tensor" or row.layout is None:
            return observer
        spec = row.spec.for_dtype(row.dtype).weight_only()
        shape = (row.layout.rows, row.layout.columns)
        seen = (self._finite(chunk) for chunk in pieces)
        with naming(row):
            return FixedObserver(check_chosen(observer.observe_chunks(seen, spec), spec, shape))

    def _finite(self, chunk: Chunk) -> Tensor:
        tensor = self.source.read_chunk(chunk.row.name, chunk)
        check_finite(tensor, first=chunk.start, shape=chunk.row.shape)
        return tensor

    def _convert(self, chunk: Chunk, observer: Observer | None) -> Converted:
        row = chunk.row
        tensor = self.source.read_chunk(row.name, chunk)
        read = hashlib.sha256(tensor_bytes(tensor)).hexdigest()
        if row.spec is None:
            return Converted(chunk, tensor, read, None)
        with naming(row):
            value = self._encode(chunk, tensor, observer)
        tally = None
        if self.demand.comparing:
            tally = Tally()
            tally.add(tensor, value)
        return Converted(chunk, value, read, tally)

    def _encode(self, chunk: Chunk, tensor: Tensor, observer: Observer | None) -> Value:
        try:
            return self.encoder.encode(chunk.described(), tensor, observer)
        except NumericsError:
            # The error has a position in the chunk; raise one with the position in the tensor.
            spec = chunk.row.spec
            check_finite(tensor, first=chunk.start, shape=chunk.row.shape)
            if isinstance(spec, CastSpec):
                check_finite(tensor, spec.dtype, first=chunk.start, shape=chunk.row.shape)
            raise


class FixedObserver(Observer):
    """Returns the scale and zero point that another observer has chosen for a whole weight."""

    def __init__(self, params: QuantParams) -> None:
        self.params = params

    def observe_weight(self, weight: Tensor, spec: QuantSpec) -> QuantParams:
        """Return the chosen scale and zero point for any weight."""
        return self.params
