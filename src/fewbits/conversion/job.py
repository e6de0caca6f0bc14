"""`Job`: one source on its way to a result; everything a quantizer knows from `prepare` to `reset`."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import attrs
from torch import Tensor

from fewbits.calibration import Observed
from fewbits.checkpoint.codec import Value
from fewbits.checkpoint.output import Output
from fewbits.checkpoint.serializer import Serializer
from fewbits.checkpoint.shards import Shard
from fewbits.errors import CalibrationError, NumericsError
from fewbits.numerics.dtypes import dtype_name
from fewbits.observers.base import Observer
from fewbits.selection.ledger import Ledger, LedgerRow
from fewbits.selection.progress import Progress
from fewbits.sources.base import Source
from fewbits.sources.model_config import Readers
from fewbits.validation.report import Report

_Made = TypeVar("_Made")


@attrs.frozen
class Share:
    """What one process has done of a result on disk.

    Attributes:
        files: those that it wrote, or found complete.
        converted: bytes of the source that it converted.
        resumed: bytes of the source that an earlier run had converted, and that it took over.
    """

    files: tuple[str, ...] = ()
    converted: int = 0
    resumed: int = 0


@attrs.frozen
class Conversion:
    """How a scheme makes the stored form of a tensor.

    Attributes:
        make: of one tensor, by its row, with its observer if it is to have codes.
        by_rows: whether it makes of some rows of a tensor what it makes of them in the whole one.
        recipe: what else than ledger and tensors decides on the codes; see `fewbits.conversion.recipe.described`.
    """

    make: Callable[[LedgerRow, Tensor, Observer | None], Value]
    by_rows: bool
    recipe: Callable[[], object]


class Job(ABC):
    """What is done with one source.

    Attributes:
        source: where tensors come from.
        ledger: their fates.
        observers: by tensor name, one for each quantized tensor.
        input_observers: likewise, one for each tensor whose layer has static int8 activations.
        measures: whether `convert` compares the result with the source unless asked not to.
        left_behind: files of the source that look like weights and are not part of the result.
        readers: who can open the result, if it is a directory made from a model of transformers.
        shares: what each process has done of a result on disk.
        leads: whether this process tells what was found, if there are several.
        observed: how much data `observe` has run, in all calls; None if there was none.
        report: what the last validation found.
    """

    measures: bool
    left_behind: Sequence[str] = ()
    readers: Readers | None = None
    shares: Sequence[Share] = ()
    leads = True

    def __init__(
        self,
        source: Source,
        ledger: Ledger,
        observers: Mapping[str, Observer],
        input_observers: Mapping[str, Observer],
    ) -> None:
        self.source, self.ledger, self.observers, self.input_observers = source, ledger, observers, input_observers
        self.observed: Observed | None = None
        self.report: Report | None = None

    @property
    def wanting(self) -> dict[str, Observer]:
        """The observers of weights that need data."""
        return {name: observer for name, observer in self.observers.items() if observer.needs_data}

    def refuse_calibration(self) -> None:
        """Refuse observers that need data, for a source that has none.

        Raises:
            CalibrationError: naming one.
        """
        for observer in [*self.wanting.values(), *self.input_observers.values()]:
            raise CalibrationError(
                f"{type(observer).__name__} needs data, and a state dict or a file has no forward to see any; prepare "
                "the model itself, or choose another observer, or other activations"
            )

    def shards(self, conversion: Conversion, serializer: Serializer, output: Output) -> tuple[Shard, ...]:
        """The files that a result has there, planned from the ledger alone; none for a result in memory.

        Raises:
            ArgumentError: if the result cannot be written there, or not within the limits of the output.
        """
        return ()

    @abstractmethod
    def convert(
        self,
        conversion: Conversion,
        serializer: Serializer,
        *,
        output: str | os.PathLike[str] | Output | None,
        measuring: bool,
        progress: Progress,
    ) -> object:
        """Take every row from source to result.

        Returns:
            the result, of the kind that the source is.

        Raises:
            ArgumentError: if `output` is missing, or does not go with this kind of source.
            CalibrationError: if an observer needs data and has seen none.
            NumericsError: naming the tensor that cannot be converted.
        """

    @abstractmethod
    def examine(self, serializer: Serializer, fail_under: float, progress: Progress) -> Report:
        """Check the result against the source, the ledger, and what was written."""

    @abstractmethod
    def save(self, serializer: Serializer, path: str | os.PathLike[str], max_shard_size: int | None) -> None:
        """Write the result, with every figure that was measured.

        Raises:
            CheckpointError: if the source holds something that no file can.
            ArgumentError: if the path is that of the float source.
        """

    def drop(self) -> None:  # noqa: B027  (only a model has anything to let go of)
        """Take the hooks off the prepared model."""


def named(row: LedgerRow, act: Callable[[], _Made]) -> _Made:
    """Do something for a row; an error of the numbers gets the tensor's name."""
    try:
        return act()
    except (NumericsError, CalibrationError) as error:
        where = f"{row.name}, shape {row.shape}, {dtype_name(row.dtype)}, to {row.scheme}"
        raise type(error)(f"{where}: {error}") from error
