"""Checkpoints in the formats of other tools: `ForeignCheckpoint` reads one, `Exporter` writes one."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

from fewbits.checkpoint.codec import Value
from fewbits.errors import CheckpointError
from fewbits.numerics.tensor import QuantizedTensor, same_bits
from fewbits.selection.ledger import Ledger
from fewbits.selection.progress import Progress
from fewbits.selection.row import LedgerRow


class Readable(Protocol):
    """A quantized checkpoint that can be read tensor by tensor, such as `fewbits.checkpoint.reading.Checkpoint`.

    Attributes:
        path: the file or directory.
        ledger: every tensor, by its name before quantization.
    """

    @property
    def path(self) -> str | os.PathLike[str]: ...

    @property
    def ledger(self) -> Ledger: ...

    def value(self, name: str) -> Value:
        """Return the stored form of a tensor of the ledger that is not merged into another."""


class ForeignCheckpoint(ABC):
    """A quantized checkpoint that another tool wrote. Opening reads headers only.

    Attributes:
        format: the name of the format, in messages.
        path: the file or directory.
        ledger: every tensor, by its name before quantization. A row is "quantized" if its codes are kept as they are.
        about: notes on how the checkpoint was read.
    """

    format: ClassVar[str]
    path: str | os.PathLike[str]
    ledger: Ledger
    about: tuple[str, ...] = ()

    @classmethod
    @abstractmethod
    def recognizes(cls, path: Path) -> bool:
        """Tell from names and headers whether a checkpoint has this format.

        Raises:
            CheckpointError: if the files cannot be read.
        """

    @abstractmethod
    def value(self, name: str) -> Value:
        """Read a tensor of the ledger into new memory.

        Raises:
            FormatError: if its parts contradict one another.
        """


class Exporter(ABC):
    """Writes a quantized checkpoint in the format of another tool.

    Args:
        allow: whether to write a checkpoint that has obstacles.

    Attributes:
        name: the name of the format, as in ``fewbits convert --format NAME``.
        suffix: how the name of a result ends that is a single file; "" if results are directories.
    """

    name: ClassVar[str]
    suffix: ClassVar[str] = ""

    def __init__(self, *, allow: bool = False) -> None:
        self.allow = allow

    @abstractmethod
    def obstacles(self, source: Readable) -> dict[str, str]:
        """Explain, by the name of each tensor, what readers of the format cannot take; empty if they take everything.

        Only headers are read.
        """

    @abstractmethod
    def write(self, source: Readable, target: Path, progress: Progress) -> None:
        """Write all tensors, one at a time.

        Args:
            source: the checkpoint.
            target: a new directory, which exists and is empty, or the path of a new file.
            progress: called before and after every tensor.

        Raises:
            FormatError: if the format cannot hold the result.
        """

    @abstractmethod
    def open(self, target: Path) -> Readable:
        """Open a result, for `check`."""

    def settings(self, source: Readable, vocabularies: Collection[int]) -> Mapping[str, Any]:
        """Return the ``quantization_config`` for ``config.json`` beside a result; empty for none.

        Args:
            source: the checkpoint.
            vocabularies: vocabulary sizes of the model.
        """
        return {}

    def check(self, source: Readable, target: Path, progress: Progress) -> None:
        """Read a result back, and compare every tensor with the source: the dequantized values must be equal.

        Raises:
            CheckpointError: naming the first tensor that differs.
        """
        result = self.open(target)
        for row in source.ledger.stored:
            if row.name not in result.ledger:
                raise CheckpointError(f"{target}: {row.name} was not written")
            found = result.value(row.name)
            if not same_values(found, source.value(row.name), row):
                raise CheckpointError(f"{target}: {row.name} reads back with other values than {source.path} has")


def same_values(found: Value, expected: Value, row: LedgerRow) -> bool:
    """Tell whether two stored forms of a tensor give the same values in the dtype of its row, bit for bit."""
    tensors = [value.dequantize() if isinstance(value, QuantizedTensor) else value for value in (found, expected)]
    first, second = (tensor.to(row.dtype) for tensor in tensors)
    return same_bits(first, second)
