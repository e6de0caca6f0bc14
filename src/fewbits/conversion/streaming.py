"""`Streaming`: reads a checkpoint on disk in chunks, converts each, and compares it with the source."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import attrs
import torch
from torch import Tensor

from fewbits.checkpoint.chunks import Chunk, chunks
from fewbits.checkpoint.codec import Value
from fewbits.conversion.budget import Budget, Demand
from fewbits.conversion.encoder import TensorEncoder, naming
from fewbits.errors import NumericsError
from fewbits.numerics.layout import Layout, WeightMatrix
from fewbits.numerics.metrics import Tally
from fewbits.numerics.params import QuantParams
from fewbits.numerics.quantize import check_chosen, check_finite
from fewbits.numerics.scratch import Scratch, working_in
from fewbits.numerics.spec import CastSpec, QuantSpec
from fewbits.observers.base import Observer
from fewbits.selection.ledger import Ledger
from fewbits.selection.row import LedgerRow
from fewbits.sources.file import FileSource

_Made = TypeVar("_Made")

#: A chunk, its stored form, and its comparison with the source, if there is one.
Converted = tuple[Chunk, Value, Tally | None]


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
            ledger: the rows of all tensors, or of those in one file.
            done: the number of elements of each tensor that an earlier run has converted, by tensor name.
        """
        return in_order(self._tasks(ledger, done), self.budget.threads)

    def _tasks(self, ledger: Ledger, done: Mapping[str, int]) -> Iterator[Callable[[], Converted]]:
        for row in ledger.stored:
            missing = list(self._chunks(row, done.get(row.name)))
            if missing:
                observer = self._observer(row, missing)
                for chunk in missing:
                    yield partial(self._convert, chunk, observer)

    def _chunks(self, row: LedgerRow, done: int | None = None) -> Iterator[Chunk]:
        """The chunks from element `done` on; one whole chunk, if the scheme must see all rows."""
        if done == math.prod(row.shape):
            return iter([])
        if self.encoder.by_rows or row.layout is None:
            return chunks(row, self.budget.chunk_elements, start=done or 0)
        return iter([Chunk.whole(row)])

    def _observer(self, row: LedgerRow, missing: Sequence[Chunk]) -> Observer | None:
        """The observer of a row. If several chunks share one scale, it has chosen that scale from the whole tensor.

        Args:
            row: the row of a tensor.
            missing: its chunks that are to be converted; an earlier run may have converted those before.
        """
        observer = self.demand.observers.get(row.name)
        if observer is None or row.layout is None or not isinstance(row.spec, QuantSpec):
            return observer
        is_whole = len(missing) == 1 and not missing[0].start
        if is_whole or row.spec.granularity != "tensor":
            return observer
        spec = row.spec.for_dtype(row.dtype).weight_only()
        shape = (row.layout.rows, row.layout.columns)
        seen = (self._rows(chunk, row.layout) for chunk in self._chunks(row))
        with naming(row):
            return FixedObserver(check_chosen(observer.observe_chunks(seen, spec), spec, shape))

    def _rows(self, chunk: Chunk, layout: Layout) -> Tensor:
        """Read a chunk as rows of the tensor's matrix; a whole tensor comes in its own shape."""
        tensor = self.source.read_chunk(chunk.row.name, chunk)
        check_finite(tensor, first=chunk.start, shape=chunk.row.shape)
        return WeightMatrix(tensor, layout).whole() if chunk.is_whole else tensor

    def _convert(self, chunk: Chunk, observer: Observer | None) -> Converted:
        row = chunk.row
        tensor = self.source.read_chunk(row.name, chunk)
        if row.spec is None:
            return chunk, tensor, None
        with naming(row):
            value = self._encode(chunk, tensor, observer)
        tally = None
        if self.demand.comparing:
            tally = Tally()
            tally.add(tensor, value)
        return chunk, value, tally

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


def in_order(tasks: Iterable[Callable[[], _Made]], threads: int) -> Iterator[_Made]:
    """Run tasks, and yield their results in the order of the tasks.

    Torch's own threads are off, because they would compete with these. At most `threads` + 1 results wait, so that
    memory stays bounded. Each thread reuses its scratch memory from task to task.

    Args:
        tasks: the tasks; the thread that takes the results iterates over them.
        threads: how many tasks run at a time; 1 runs them on the calling thread.
    """
    before, grad, memory = torch.get_num_threads(), torch.is_grad_enabled(), _OfThread()

    def act(task: Callable[[], _Made]) -> _Made:
        # Torch keeps the gradient mode per thread.
        with torch.set_grad_enabled(grad), working_in(memory.kept):
            return task()

    torch.set_num_threads(1)
    try:
        yield from map(act, tasks) if threads == 1 else _in_threads(tasks, threads, act)
    finally:
        torch.set_num_threads(before)


def _in_threads(
    tasks: Iterable[Callable[[], _Made]], threads: int, act: Callable[[Callable[[], _Made]], _Made]
) -> Iterator[_Made]:
    waiting: deque[Future[_Made]] = deque()
    # A number that another thread sets now would become the start value of these threads.
    pool = ThreadPoolExecutor(threads, "fewbits", initializer=torch.set_num_threads, initargs=(1,))
    try:
        for task in tasks:
            waiting.append(pool.submit(act, task))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.kept = Scratch()
