"""`FileJob`: the conversion of a checkpoint on disk, a chunk at a time."""

from __future__ import annotations

import os
from pathlib import Path

import attrs
import torch
from torch import nn

from fewbits.calibration.running import Forward
from fewbits.checkpoint.metadata import Metadata
from fewbits.checkpoint.output import MAX_SHARD_SIZE, Output
from fewbits.checkpoint.publishing import check_name_and_parent
from fewbits.checkpoint.reading import Checkpoint
from fewbits.checkpoint.saving import save
from fewbits.checkpoint.serializer import Serializer
from fewbits.checkpoint.shards import STEM, Shard, plan_shards
from fewbits.conversion.budget import Budget, Demand, choose_budget
from fewbits.conversion.coordinator import Coordinator, Written, convert_on_ranks
from fewbits.conversion.encoder import TensorEncoder
from fewbits.conversion.file_calibration import FileCalibration
from fewbits.conversion.file_evaluation import FileEvaluation
from fewbits.conversion.file_writer import FileWriter, Share
from fewbits.conversion.job import Job, measurements
from fewbits.conversion.planned_tuning import PlannedTuning
from fewbits.conversion.ranks import Group, Ranks
from fewbits.conversion.staging import StagingDirectory
from fewbits.conversion.streaming import Streaming
from fewbits.errors import ArgumentError, CalibrationError, CheckpointError, StateError
from fewbits.observers.base import Observer
from fewbits.rounding.base import Rounding
from fewbits.selection.ledger import Ledger
from fewbits.selection.progress import Progress, no_progress
from fewbits.sources.file import FileSource
from fewbits.validation.evaluation import Evaluation, checked_model
from fewbits.validation.outputs import ModelReport
from fewbits.validation.report import Report
from fewbits.validation.verify import verify


class FileJob(Job):
    """The conversion of a checkpoint on disk. Only a few chunks of it are in memory at any time.

    Args:
        source: the checkpoint.
        ledger: the fate of each tensor.
        observer: see `Job`.
        activation_observer: see `Job`.
        rounding: the strategy that picks the codes.
        model: a model with the weights of the checkpoint, for a rounding strategy that needs data. The quantized
            tensors are in memory then.

    Attributes:
        left_behind: files of the source that look like weights and are not part of the result.
        readers: who can open the result, if it is a directory made from a transformers model.
    """

    source: FileSource
    compares = True

    def __init__(
        self,
        source: FileSource,
        ledger: Ledger,
        observer: Observer,
        activation_observer: Observer,
        rounding: Rounding,
        model: nn.Module | None = None,
    ) -> None:
        super().__init__(source, ledger, observer, activation_observer, rounding)
        self.refuse_calibration(even_rounding=model is None)
        self._calibration: FileCalibration | None = None
        if model is not None:
            self._calibration = FileCalibration(model, source, ledger, self.observers, rounding)
        self.left_behind, self.readers = source.left_behind, source.readers(ledger)
        self._evaluation: FileEvaluation | None = None
        self._serializer: Serializer | None = None
        self._model: ModelReport | None = None
        self._beyond_limits: tuple[str, ...] = ()
        self._written: Written | None = None
        self._budget: Budget | None = None
        self._ranks = Ranks()

    @property
    def shares(self) -> tuple[Share, ...]:
        """The work of each process."""
        return () if self._written is None else self._written.shares

    @property
    def leads(self) -> bool:
        """Whether this process reports for all processes that share the conversion."""
        return self._ranks.rank == 0

    def plan(self, tuning: PlannedTuning | None, evaluation: Evaluation | None) -> None:
        """Plan work on the results before they are written.

        Args:
            tuning: how to tune the scales; None leaves them unchanged.
            evaluation: how to compare the result with the model; None does not compare.

        Raises:
            ArgumentError: if there is no model, or `tuning` asks for more than scales.
            MismatchError: naming the converted tensors that are not exactly one parameter of the model.
        """
        if self._calibration is None:
            raise ArgumentError("a file is tuned and compared with model=, a model that has its weights")
        self._evaluation = None if evaluation is None else self._own_evaluation(evaluation)
        self._calibration.plan(tuning, self._evaluation)

    def module(self) -> nn.Module | None:
        """Return the model to run for calibration; None if there is none."""
        return None if self._calibration is None else self._calibration.model

    def watching(self, forward: Forward | None, spill: Path | None) -> Forward | None:
        """Return a forward that also shows each batch to the calibration."""
        return forward if self._calibration is None else self._calibration.watching(forward, spill)

    def convert(
        self, encoder: TensorEncoder, serializer: Serializer, output: Output | None, comparing: bool, progress: Progress
    ) -> Path:
        """Write the result. It appears at its path only after all of it was written, read back and checked."""
        if output is None:
            raise ArgumentError(f"quantizing the file {self.source.path} needs output=, the path to write to")
        self._serializer = serializer
        if self._calibration is not None:
            self._calibration.check_data()
        with Group() if output.distributed else Ranks() as ranks:
            coordinator = self.coordinator(
                encoder, serializer, output, comparing=comparing, shared=ranks.count > 1, progress=progress
            )
            self._written = convert_on_ranks(coordinator, ranks)
        self._ranks = ranks
        if self._calibration is not None:
            self.ledger = self._calibration.remarked(self.ledger)
        return output.path

    def coordinator(
        self,
        encoder: TensorEncoder,
        serializer: Serializer,
        output: Output,
        *,
        comparing: bool,
        shared: bool,
        progress: Progress = no_progress,
    ) -> Coordinator:
        """Plan the conversion; nothing is written yet.

        Args:
            encoder: converts tensors.
            serializer: the format of the files.
            output: where the result goes.
            comparing: whether to compare the result with the source.
            shared: whether other processes write files of the result too.
            progress: called before and after every chunk.

        Raises:
            ArgumentError: if the result cannot be written there, or not within the limits of the output.
        """
        if self._calibration is not None:
            encoder = self._calibration.encoder(encoder)
        names = [row.name for row in self.ledger.stored]
        gathered = {name: nbytes for name in names if (nbytes := self.source.gathered_bytes(name))}
        demand = Demand(self.ledger, self.observers, encoder.by_rows, comparing, gathered)
        folder = self.source.folder is not None or output.max_shard_size is not None
        shards = {shard.file: shard for shard in self._plan_shards(output, serializer, folder)}
        self._budget = choose_budget(demand, output, output.threads or torch.get_num_threads())
        streaming = Streaming(self.source, demand, encoder, self._budget)
        staging = StagingDirectory(output, folder=folder, names=[*shards])
        writer = FileWriter(streaming, serializer, shards, staging, progress)
        return Coordinator(writer, output.path, self.readers, shared=shared)

    def adopt(self, written: Written) -> None:
        """Take over a result that other processes have written."""
        self._written = written

    def _plan_shards(self, output: Output, serializer: Serializer, folder: bool) -> tuple[Shard, ...]:
        self.source.refuse_output(output.path, folder=folder)
        files, advice = self.source.files, ""
        if output.max_shard_size is None and len(files) == 1:
            advice = f"; or, for a file alone, give {files[0]} as the source"
        check_name_and_parent(output.path, serializer, folder=folder, advice=advice)
        if not folder:
            return (Shard(output.path.name, self.ledger),)
        stem = STEM if self.readers is None else self.readers.stem
        return plan_shards(self.ledger, output.max_shard_size or MAX_SHARD_SIZE, serializer.suffix, stem)

    def evaluate(self, evaluation: Evaluation | None, progress: Progress) -> None:
        """Take over the planned comparison, which ran before the files were written, or run this evaluation.

        Args:
            evaluation: the evaluation to run; None takes the planned one, if there is one.
            progress: called after every batch.
        """
        self._model, self._beyond_limits = None, ()
        planned = self._evaluation if evaluation is None else self._own_evaluation(evaluation)
        if planned is None:
            return
        written = self._result()
        try:
            found = planned.known or planned.run(Checkpoint(written.path, self._serializer).value, progress)
        except CalibrationError as error:
            raise CalibrationError(f"{written.path} is written, but not compared with the model: {error}") from error
        self._model, self._beyond_limits = found.model, tuple(found.model.failures(planned.limits))

    def _own_evaluation(self, evaluation: Evaluation) -> FileEvaluation:
        model = checked_model(self.module(), inplace=False)
        return FileEvaluation(model, self.ledger, self.source.read, evaluation)

    def examine(self, serializer: Serializer, fail_under: float, progress: Progress) -> Report:
        """Check every digest on disk, and compare with the source all tensors that `convert` has not compared."""
        written = self._result()

        def look() -> Report:
            result = Checkpoint(written.path, serializer)
            return verify(
                result,
                self.source,
                measured=written.measured if result.headers == written.headers else {},
                chunk_elements=None if self._budget is None else self._budget.chunk_elements,
                fail_under=fail_under,
                progress=progress,
            )

        try:
            report = self._ranks.lead(look)
        except KeyboardInterrupt as stop:
            advice = f"fewbits verify {written.path} --against {self.source.path}"
            stop.args = stop.args or (f"interrupted; {written.path} is complete, but not verified yet: {advice}",)
            raise
        notes = () if self._calibration is None else self._calibration.notes
        general, about = (*report.general, *self._beyond_limits), (*report.about, *notes)
        self.report = attrs.evolve(report, observed=self.observed, model=self._model, general=general, about=about)
        return self.report

    def save(self, serializer: Serializer, path: str | os.PathLike[str], max_shard_size: int | None) -> None:
        """Write the result once more."""
        self.source.refuse_output(Path(path), folder=max_shard_size is not None)
        written = self._result()
        result = Checkpoint(written.path, serializer)
        if result.headers != written.headers:
            raise CheckpointError(f"{written.path} is not the result of convert(); call convert() again")
        result.check("digests")
        measured = {**written.measured, **measurements(self.report)}
        outputs, of_model = result.metadata.output_sqnr_db, result.metadata.model_metrics
        about = Metadata(self.ledger, extra=self.source.extra, output_sqnr_db=outputs, model_metrics=of_model)
        save(serializer, path, about, result.value, measured=measured, max_shard_size=max_shard_size)

    def _result(self) -> Written:
        if self._written is None:
            raise StateError("there is no result; call convert() first")
        return self._written
