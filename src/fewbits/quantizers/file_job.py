"""`FileJob`: a checkpoint on disk on its way to a quantized one, a chunk at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import attrs
import torch
from torch import Tensor

from fewbits._events import emit
from fewbits.checkpoint.chunks import Chunk, chunks, columns_of
from fewbits.checkpoint.output import MAX_SHARD_SIZE, Output
from fewbits.checkpoint.publishing import NewFolder
from fewbits.checkpoint.reading import Checkpoint
from fewbits.checkpoint.saving import CheckpointWriter, Value, save
from fewbits.checkpoint.serializer import Serializer
from fewbits.checkpoint.shards import Shard, plan_shards, write_index
from fewbits.errors import ArgumentError, CheckpointError, NumericsError, StateError
from fewbits.numerics.metrics import Measurement, Tally, unit_of
from fewbits.numerics.quantize import check_chosen, check_finite
from fewbits.numerics.spec import CastSpec, QuantSpec
from fewbits.observers.base import Observer
from fewbits.quantizers.budget import Budget, Demand, settle
from fewbits.quantizers.job import Conversion, Job, named
from fewbits.quantizers.pool import in_order
from fewbits.quantizers.settled import SettledObserver
from fewbits.selection.ledger import Ledger, LedgerRow
from fewbits.selection.progress import Progress, Step
from fewbits.sources.file import FileSource
from fewbits.validation.report import Report
from fewbits.validation.verify import verify


@attrs.frozen(eq=False)
class _Converted:
    """The stored form of a chunk, and how it compares with the source; None if that was not asked for."""

    chunk: Chunk
    value: Value
    tally: Tally | None


class FileJob(Job):
    """What is done with a source on disk. Memory holds some chunks of it, and nothing else that grows with it."""

    source: FileSource
    measures = True

    def __init__(
        self,
        source: FileSource,
        ledger: Ledger,
        observers: Mapping[str, Observer],
        input_observers: Mapping[str, Observer],
    ) -> None:
        super().__init__(source, ledger, observers, input_observers)
        self.refuse_calibration()
        self.left_behind = source.left_behind
        self._output: Path | None = None
        self._budget: Budget | None = None
        self._measured: dict[str, Measurement] = {}
        self._written: dict[str, str] = {}

    def convert(
        self,
        conversion: Conversion,
        serializer: Serializer,
        *,
        output: str | os.PathLike[str] | Output | None,
        measuring: bool,
        progress: Progress,
    ) -> Path:
        """Write the result. Nothing is at its path before all of it has been written, read back and checked."""
        if output is None:
            raise ArgumentError(f"quantizing the file {self.source.path} needs output=, the path to write to")
        output = Output.of(output)
        shards = self.shards(output, serializer)
        self._output, self._measured = None, {}
        demand = Demand(self.ledger, self.observers, conversion.by_rows, measuring)
        self._budget = settle(demand, output, output.threads or torch.get_num_threads())
        run = _Run(self.source, demand, conversion, serializer, self._budget, self._measured)
        told = _Told(self.ledger, progress)
        if self._is_folder(output):
            self._write_folder(run, shards, serializer.suffix, output, told)
        else:
            run.write(self.ledger, output.path, told)
        self._written = dict(Checkpoint(output.path, serializer).metadata.digests)
        self._output = output.path
        return output.path

    def shards(self, output: Output, serializer: Serializer) -> tuple[Shard, ...]:
        """The files that the result has there, planned from the ledger alone."""
        self.source.refuse_output(output.path, folder=self._is_folder(output))
        if not self._is_folder(output):
            return (Shard(output.path.name, self.ledger),)
        return plan_shards(self.ledger, output.max_shard_size or MAX_SHARD_SIZE, serializer.suffix)

    def _is_folder(self, output: Output) -> bool:
        return self.source.folder is not None or output.max_shard_size is not None

    def _write_folder(self, run: _Run, shards: Sequence[Shard], suffix: str, output: Output, told: _Told) -> None:
        with NewFolder(output.path, replace=output.replace) as folder:
            digests = {shard.file: run.write(shard.ledger, folder.work / shard.file, told) for shard in shards}
            write_index(folder.work, shards, digests, suffix)
            self.source.copy_companions(folder.work)
            folder.publish()
        if self.left_behind:
            emit("warning", "left_behind", folder=str(self.source.folder), files=list(self.left_behind))

    def examine(self, serializer: Serializer, fail_under: float, progress: Progress) -> Report:
        """Check every digest of what is on disk; what was not measured when it was written, against the source too."""
        path = self._result()
        as_written = dict(Checkpoint(path, serializer).metadata.digests) == self._written
        self.report = verify(
            path,
            self.source,
            serializer=serializer,
            measured=self._measured if as_written else {},
            chunk_elements=None if self._budget is None else self._budget.chunk_elements,
            fail_under=fail_under,
            progress=progress,
        )
        return self.report

    def save(self, serializer: Serializer, path: str | os.PathLike[str], max_shard_size: int | None) -> None:
        """Write the result once more."""
        self.source.refuse_output(Path(path), folder=max_shard_size is not None)
        result = Checkpoint(self._result(), serializer)
        if dict(result.metadata.digests) != self._written:
            raise CheckpointError(f"{self._output} is not what convert() wrote; call convert() again")
        result.check("digests")
        found = {t.name: t.measurement for t in self.report.tensors if t.measurement} if self.report else {}
        save(
            serializer,
            path,
            self.ledger,
            result.value,
            measurements=self._measured | found,
            extra=self.source.extra,
            max_shard_size=max_shard_size,
        )

    def _result(self) -> Path:
        if self._output is None:
            raise StateError("there is no result; call convert() first")
        return self._output


class _Told:
    """Tells how far a conversion is, over all its files."""

    def __init__(self, ledger: Ledger, progress: Progress) -> None:
        self._progress = progress
        self._done, self._total = 0, sum(row.bytes_before for row in ledger.stored)

    def begin(self, chunk: Chunk) -> None:
        self._progress(Step("convert", chunk.row.name, self._done, self._total))

    def end(self, chunk: Chunk) -> None:
        self._done += chunk.nbytes
        self._progress(Step("convert", chunk.row.name, self._done, self._total))


@attrs.frozen(eq=False)
class _Run:
    """One conversion: everything that every file of the result needs."""

    source: FileSource
    demand: Demand
    conversion: Conversion
    serializer: Serializer
    budget: Budget
    measured: dict[str, Measurement]

    def write(self, ledger: Ledger, path: Path, told: _Told) -> str:
        """Write one file of the result, read it back, and return the digest of its header."""
        with CheckpointWriter(self.serializer, path, ledger, extra=self.source.extra) as writer:
            tally: Tally | None = None
            for done in in_order(self._tasks(ledger), self.budget.threads):
                chunk, row = done.chunk, done.chunk.row
                told.begin(chunk)
                writer.append(chunk, done.value)
                if chunk.is_first:
                    tally = done.tally
                elif tally is not None and done.tally is not None:
                    tally.join(done.tally)
                if chunk.is_last and tally is not None:
                    self.measured[row.name] = tally.measurement(columns_of(row))
                    writer.set_measurement(row, self.measured[row.name])
                told.end(chunk)
            return writer.close()

    def _tasks(self, ledger: Ledger) -> Iterator[Callable[[], _Converted]]:
        for row in ledger.stored:
            pieces = list(self._chunks(row))
            observer = self._observer(row, pieces)
            unit = self._unit(row, pieces)
            for chunk in pieces:
                yield partial(self._convert, chunk, observer, unit)

    def _chunks(self, row: LedgerRow) -> Iterator[Chunk]:
        """A scheme of somebody else's may need to see all of a weight."""
        by_rows = self.conversion.by_rows or row.layout is None
        return chunks(row, self.budget.chunk_elements) if by_rows else iter([Chunk.whole(row)])

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
        return SettledObserver(*named(row, lambda: check_chosen(observer.observe_chunks(seen, spec), spec, shape)))

    def _finite(self, chunk: Chunk) -> Tensor:
        tensor = self.source.read_chunk(chunk.row.name, chunk)
        check_finite(tensor, first=chunk.start, shape=chunk.row.shape)
        return tensor

    def _unit(self, row: LedgerRow, pieces: Sequence[Chunk]) -> float:
        """What to take sums of squares in; only of float64 tensors this reads the source."""
        if not self.demand.measuring or row.spec is None or row.dtype != torch.float64:
            return 1.0
        return unit_of(self.source.read_chunk(row.name, chunk) for chunk in pieces)

    def _convert(self, chunk: Chunk, observer: Observer | None, unit: float) -> _Converted:
        row = chunk.row
        tensor = self.source.read_chunk(row.name, chunk)
        if row.spec is None:
            return _Converted(chunk, tensor, None)
        value = named(row, lambda: self._make(chunk, tensor, observer))
        tally = None
        if self.demand.measuring:
            tally = Tally(unit)
            tally.add(tensor, value)
        return _Converted(chunk, value, tally)

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
