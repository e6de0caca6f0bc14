"""`Source` and `Target`: tensors come out of the one by name and go into the other by name."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from torch import Tensor, nn

from fewbits.checkpoint.saving import Value
from fewbits.checkpoint.serializer import Serializer
from fewbits.numerics.metrics import Measurement
from fewbits.selection.info import TensorInfo
from fewbits.selection.ledger import Ledger, LedgerRow


class Target(ABC):
    """Takes the stored form of each tensor and ends up as the result."""

    @abstractmethod
    def put(self, row: LedgerRow, value: Value, measurement: Measurement | None) -> None:
        """Take the stored form of one row, which is not an alias."""

    @abstractmethod
    def finish(self) -> object:
        """The result: a module, a mapping, or the path of a file."""

    @abstractmethod
    def value(self, name: str) -> Value:
        """The stored form of one tensor of the finished result."""

    @property
    def output(self) -> Path | None:
        """The path of the result, if it is a file."""
        return None

    def is_as_written(self) -> bool:
        """Whether the result still is what was put in; only a file can be another one."""
        return True

    def abort(self) -> None:  # noqa: B027  (only files have anything to undo)
        """Give up; leave nothing half-made behind."""


class Source(ABC):
    """Something to quantize.

    Attributes:
        infos: one for every tensor in it, in its own order.
        inplace: whether the result replaces it.
        architecture: the class of the model; None if unknown.
        extra: strings to carry over into the result's file.
        unstorable: what the source holds and no file of ours can, in words.
    """

    infos: tuple[TensorInfo, ...]
    inplace: bool = False
    architecture: str | None = None
    extra: Mapping[str, str] = MappingProxyType({})
    unstorable: Sequence[str] = ()

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """One of its tensors as it is now."""

    @abstractmethod
    def prepared(self) -> object:
        """What `Quantizer.prepare` returns."""

    @abstractmethod
    def target(self, ledger: Ledger, serializer: Serializer, output: str | os.PathLike[str] | None) -> Target:
        """Begin a result.

        Raises:
            ArgumentError: if `output` is missing, or does not go with this kind of source.
        """

    def is_file(self, path: str | os.PathLike[str]) -> bool:
        """Whether the source is the file at this path."""
        return False

    def module(self) -> nn.Module | None:
        """The model that can be run for calibration; None if there is none."""
        return None
