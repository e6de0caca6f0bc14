"""`FileJob`: a checkpoint on disk on its way to a quantized one, a chunk at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from fewbits.checkpoint.output import MAX_SHARD_SIZE, Output
from fewbits.checkpoint.publishing import check_name_and_parent
from fewbits.checkpoint.reading import Checkpoint
from fewbits.checkpoint.saving import save
from fewbits.checkpoint.serializer import Serializer
from fewbits.checkpoint.shards import STEM, Shard, plan_shards
from fewbits.conversion.budget import Budget, Demand, settle
from fewbits.conversion.file_run import FileRun, Finished
from fewbits.conversion.job import Conversion, Job, Share
from fewbits.conversion.ranks import Group, Ranks, spread
from fewbits.conversion.staging import StagingDirectory
from fewbits.conversion.streaming import Streaming
from fewbits.errors import ArgumentError, CheckpointError, StateError
from fewbits.numerics.metrics import Measurement
from fewbits.observers.base import Observer
from fewbits.selection.ledger import Ledger
from fewbits.selection.progress import Progress, no_progress
from fewbits.sources.file import FileSource
from fewbits.validation.report import Report
from fewbits.validation.verify import verify_checkpoint


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
        self.readers = source.readers(ledger)
        self._output: Path | None = None
        self._budget: Budget | None = None
        self._finished: Finished | None = None
        self._ranks = Ranks()

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
        self._output, self._finished = None, None
        ranks = Group() if output.distributed else Ranks()
        shared = ranks.count > 1
        with ranks:
            run = self.run(conversion, serializer, output, measuring=measuring, shared=shared, progress=progress)
            try:
                self._write(run, serializer, output, ranks)
            finally:
                run.release()
        self._output, self._ranks, self.leads = output.path, ranks, not ranks.rank
        return output.path

    def _write(self, run: FileRun, serializer: Serializer, output: Output, ranks: Ranks) -> None:
        """Write this rank's share of the result, and see that there is a whole one in the end."""
        if ranks.lead(run.begin):
            if ranks.rank:
                run.join()
            run.write(spread(run.sizes, ranks.count)[ranks.rank])
            self.shares = ranks.gather(run.share)
            self._finished = ranks.lead(run.finish)
        else:
            self.shares = ranks.lead(lambda: self._accept(run, output, serializer))

    def conclude(self, run: FileRun, serializer: Serializer, output: Output, shares: Sequence[Share]) -> None:
        """Publish what processes have written, with the share of each.

        Of a result that was there already, see that it is what they would have written.
        """
        if run.begun:
            self._finished, self.shares = run.finish(), shares
        else:
            self.shares = self._accept(run, output, serializer)
        self._output = output.path

    def run(
        self,
        conversion: Conversion,
        serializer: Serializer,
        output: Output,
        *,
        measuring: bool,
        shared: bool,
        progress: Progress = no_progress,
    ) -> FileRun:
        """The conversion, not begun; `shared` if other processes write files of it, too."""
        gathered = {row.name: self.source.gathered_bytes(row.name) for row in self.ledger.stored}
        gathered = {name: nbytes for name, nbytes in gathered.items() if nbytes}
        demand = Demand(self.ledger, self.observers, conversion.by_rows, measuring, gathered)
        shards = self._planned(output, serializer)
        self._budget = settle(demand, output, output.threads or torch.get_num_threads())
        folder = self._is_folder(output)
        return FileRun(
            Streaming(self.source, demand, conversion, self._budget),
            serializer,
            shards,
            StagingDirectory(output, folder=folder, names=[shard.file for shard in shards]),
            readers=self.readers,
            paranoid=output.paranoid,
            shared=shared,
            progress=progress,
        )

    def _accept(self, run: FileRun, output: Output, serializer: Serializer) -> list[Share]:
        """Go on with a result that is complete: all of it is compared with the source, and counts as measured.

        Returns:
            the share of the one process that found it complete.

        Raises:
            ArgumentError: if it is not what this conversion would make.
        """
        result = Checkpoint(output.path, serializer)
        report = verify_checkpoint(result, self.source, chunk_elements=self._chunk_elements, fail_under=-math.inf)
        found = report.failures
        if {row.name: row for row in result.ledger} != {row.name: row for row in self.ledger}:
            found = ["the fates of its tensors are others", *found]
        if result.headers.keys() != run.sizes.keys():
            found = ["it has other files", *found]
        if found:
            raise ArgumentError(
                f"{output.path} is there already, and is not what this would make of {self.source.path}: {found[0]}. "
                "Give another path, or replace it (--replace, Output(replace=True))"
            )
        self._finished = Finished(result.headers, _measurements(report))
        sizes = run.sizes
        return [Share(tuple(sizes), 0, sum(sizes.values()))]

    def shards(self, conversion: Conversion, serializer: Serializer, output: Output) -> tuple[Shard, ...]:
        """The files that the result has there, planned from the ledger alone, if that can be done within the limits."""
        return self.run(conversion, serializer, output, measuring=self.measures, shared=False).shards

    def _planned(self, output: Output, serializer: Serializer) -> tuple[Shard, ...]:
        folder = self._is_folder(output)
        self.source.refuse_output(output.path, folder=folder)
        check_name_and_parent(output.path, folder=folder, advice=self._way_to_a_file(output))
        if not folder:
            serializer.check_name(output.path)
            return (Shard(output.path.name, self.ledger),)
        stem = STEM if self.readers is None else self.readers.stem
        return plan_shards(self.ledger, output.max_shard_size or MAX_SHARD_SIZE, serializer.suffix, stem)

    def _way_to_a_file(self, output: Output) -> str:
        """How to get one file of a source directory that has one, as the end of a sentence."""
        files = self.source.files
        if output.max_shard_size is not None or len(files) > 1:
            return ""
        return f"; or, for a file alone, give {files[0]} as the source"

    def _is_folder(self, output: Output) -> bool:
        return self.source.folder is not None or output.max_shard_size is not None

    def examine(self, serializer: Serializer, fail_under: float, progress: Progress) -> Report:
        """Check every digest of what is on disk; what was not measured when it was written, against the source too."""
        path = self._result()

        def look() -> Report:
            result = Checkpoint(path, serializer)
            as_written = self._finished is not None and result.headers == self._finished.headers
            return verify_checkpoint(
                result,
                self.source,
                measured=self._measured if as_written else {},
                chunk_elements=self._chunk_elements,
                fail_under=fail_under,
                progress=progress,
            )

        try:
            self.report = self._ranks.lead(look)
        except KeyboardInterrupt as stop:
            advice = f"fewbits verify {path} --against {self.source.path}"
            stop.args = stop.args or (f"interrupted; {path} is complete, and not verified yet: {advice}",)
            raise
        return self.report

    def save(self, serializer: Serializer, path: str | os.PathLike[str], max_shard_size: int | None) -> None:
        """Write the result once more."""
        self.source.refuse_output(Path(path), folder=max_shard_size is not None)
        result = Checkpoint(self._result(), serializer)
        if self._finished is not None and result.headers != self._finished.headers:
            raise CheckpointError(f"{self._output} is not what convert() wrote; call convert() again")
        result.check("digests")
        found = _measurements(self.report) if self.report else {}
        save(
            serializer,
            path,
            self.ledger,
            result.value,
            measurements={**self._measured, **found},
            extra=self.source.extra,
            max_shard_size=max_shard_size,
        )

    @property
    def _measured(self) -> Mapping[str, Measurement]:
        return {} if self._finished is None else self._finished.measured

    @property
    def _chunk_elements(self) -> int | None:
        return None if self._budget is None else self._budget.chunk_elements

    def _result(self) -> Path:
        if self._output is None:
            raise StateError("there is no result; call convert() first")
        return self._output


def _measurements(report: Report) -> dict[str, Measurement]:
    return {tensor.name: tensor.measurement for tensor in report.tensors if tensor.measurement is not None}
