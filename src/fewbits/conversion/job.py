"""`Job`: one source on its way to a result, from `prepare` to `reset`."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from fewbits._events import emit
from fewbits.calibration.batches import Observed
from fewbits.calibration.running import Forward
from fewbits.checkpoint.output import Output
from fewbits.checkpoint.serializer import Serializer
from fewbits.conversion.encoder import TensorEncoder
from fewbits.errors import CalibrationError
from fewbits.numerics.metrics import Measurement
from fewbits.numerics.spec import QuantSpec
from fewbits.observers.base import Observer
from fewbits.rounding.base import Rounding
from fewbits.selection.info import TensorInfo
from fewbits.selection.ledger import Ledger
from fewbits.selection.progress import Progress
from fewbits.selection.rules import is_embedding
from fewbits.sources.base import Source
from fewbits.validation.evaluation import Evaluation
from fewbits.validation.report import Report


class Job(ABC):
    """The conversion of one source.

    Args:
        source: where the tensors come from.
        ledger: the fate of each tensor.
        observer: an observer that is copied for each quantized tensor.
        activation_observer: an observer that is copied for each tensor whose layer has static int8 activations.
        rounding: the strategy that picks the codes.

    Attributes:
        observers: the copies of `observer`, by tensor name.
        input_observers: the copies of `activation_observer`, by tensor name.
        compares: whether `convert` compares the result with the source by default.
        observed: how much data all calls of `observe` have run; None if there was none.
        report: the report of the last validation.
    """

    compares: bool

    def __init__(
        self, source: Source, ledger: Ledger, observer: Observer, activation_observer: Observer, rounding: Rounding
    ) -> None:
        self.source, self.ledger, self.rounding = source, ledger, rounding
        specs = {row.name: row.spec for row in ledger if isinstance(row.spec, QuantSpec)}
        static = [name for name, spec in specs.items() if spec.activations == "static"]
        self.observers = {name: observer.fresh() for name in specs}
        self.input_observers = {name: activation_observer.fresh() for name in static}
        self.observed: Observed | None = None
        self.report: Report | None = None

    @property
    def leads(self) -> bool:
        """Whether this process reports for all processes that share the conversion."""
        return True

    @property
    def data_observers(self) -> dict[str, Observer]:
        """The observers of weights that need data, by tensor name."""
        return {name: observer for name, observer in self.observers.items() if observer.needs_data}

    def refuse_calibration(self, *, even_rounding: bool = True) -> None:
        """Refuse strategies that need data, because the source cannot run any.

        Args:
            even_rounding: whether to refuse a rounding strategy that needs data, too.

        Raises:
            CalibrationError: naming one of them.
        """
        needing: list[Observer | Rounding] = [*self.data_observers.values(), *self.input_observers.values()]
        if even_rounding and self.rounding.needs != "nothing":
            needing.append(self.rounding)
        for strategy in needing:
            raise CalibrationError(
                f"{type(strategy).__name__} needs data, and a state dict or a file has no forward to run it; prepare "
                "the model itself, or pass the model of a file (model=, --calibrate), or choose another strategy, or "
                "other activations"
            )

    def module(self) -> nn.Module | None:
        """Return the model to run for calibration; None if there is none."""
        return self.source.module()

    @abstractmethod
    def watching(self, forward: Forward | None, spill: Path | None) -> Forward | None:
        """Return a forward that also shows the inputs of layers to strategies that need them.

        Args:
            forward: runs one batch; None feeds the batch as `default_forward` does.
            spill: a folder for temporary files with the activations; None keeps the activations in memory.
        """

    @abstractmethod
    def convert(
        self, encoder: TensorEncoder, serializer: Serializer, output: Output | None, comparing: bool, progress: Progress
    ) -> object:
        """Convert every tensor.

        Returns:
            the result: a model, a mapping or a path, like the source.

        Raises:
            ArgumentError: if `output` is missing, or does not go with this kind of source.
            CalibrationError: if an observer needs data and has seen none.
            NumericsError: naming the tensor that cannot be converted.
        """

    @abstractmethod
    def evaluate(self, evaluation: Evaluation | None, progress: Progress) -> None:
        """Run data through the float model and the quantized one; the next report has the outcome.

        Args:
            evaluation: what to run; None runs nothing, and the next report has no outcome.
            progress: called after every batch.

        Raises:
            CalibrationError: if there are not two models to run, or a batch cannot be run or compared.
        """

    @abstractmethod
    def examine(self, serializer: Serializer, fail_under: float, progress: Progress) -> Report:
        """Check the result against the source, the ledger, and the written bytes."""

    @abstractmethod
    def save(self, serializer: Serializer, path: str | os.PathLike[str], max_shard_size: int | None) -> None:
        """Write the result, with every measurement.

        Raises:
            CheckpointError: if the source holds something that no file can hold.
            ArgumentError: if the path is that of the float source.
        """

    def drop(self) -> None:  # noqa: B027  (only a model has hooks)
        """Take the hooks off the prepared model."""


def measurements(report: Report | None) -> dict[str, Measurement]:
    """The measurements in a report, by tensor name."""
    tensors = () if report is None else report.tensors
    return {tensor.name: tensor.measurement for tensor in tensors if tensor.measurement is not None}


def warn_of_missing_data(rounding: Rounding, remarks: Mapping[str, str], infos: Sequence[TensorInfo]) -> list[str]:
    """Warn of weights that were rounded without data, and return notes; embeddings have no inputs to be seen.

    Args:
        rounding: the strategy.
        remarks: what the ledger says of each weight, by name.
        infos: the tensors of the source.
    """
    embeddings = {info.name for info in infos if is_embedding(info)}
    missing = [name for name, remark in remarks.items() if remark and name not in embeddings]
    if not missing:
        return []
    first = f"{missing[0]}: {remarks[missing[0]]}"
    emit("warning", "rounded_without_data", rounding=repr(rounding), tensors=len(missing), first=first)
    return [f"{rounding!r} rounded {len(missing)} weights without data, first {first}"]
