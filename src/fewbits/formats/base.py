"""Checkpoints in the formats of other tools: `ForeignCheckpoint` reads one, `Exporter` writes one."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import attrs
import torch
from torch import Tensor

from fewbits._sizes import parse_size
from fewbits.checkpoint.codec import CODEC, Value
from fewbits.checkpoint.output import MAX_SHARD_SIZE
from fewbits.checkpoint.reading import Check, check_check
from fewbits.checkpoint.serializer import Entry
from fewbits.errors import CheckpointError, FormatError
from fewbits.numerics.dtypes import FLOAT_DTYPES
from fewbits.numerics.layout import Layout
from fewbits.numerics.params import are_sound
from fewbits.numerics.spec import QuantSpec
from fewbits.numerics.tensor import QuantizedTensor, same_bits
from fewbits.selection.ledger import Ledger
from fewbits.selection.progress import Progress, followed
from fewbits.selection.row import LedgerRow


class Described(Protocol):
    """A quantized checkpoint that exists, or that is planned.

    Attributes:
        path: the file or directory; for a planned checkpoint, its source.
        ledger: every tensor, by its name before quantization.
    """

    @property
    def path(self) -> str | os.PathLike[str]: ...

    @property
    def ledger(self) -> Ledger: ...


class Readable(Described, Protocol):
    """A quantized checkpoint that can be read tensor by tensor, such as `fewbits.checkpoint.reading.Checkpoint`."""

    def value(self, name: str) -> Value:
        """Return the stored form of a tensor of the ledger that is not merged into another."""


class ForeignCheckpoint(ABC):
    """A quantized checkpoint that another tool wrote. Opening reads headers only.

    Attributes:
        format: the name of the format, in messages.
        path: the file or directory.
        ledger: every tensor, by its name before quantization. A row is "quantized" if its codes are unchanged.
        about: notes on how the checkpoint was read.
        of_linear: names of weights that have one row per output and one column per input, whatever the model has.
    """

    format: ClassVar[str]
    path: str | os.PathLike[str]
    ledger: Ledger
    about: tuple[str, ...] = ()
    of_linear: Collection[str] = ()

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path

    @classmethod
    @abstractmethod
    def recognizes(cls, path: Path) -> bool:
        """Tell from names and headers whether a checkpoint has this format. A file of fewbits never has it.

        Raises:
            CheckpointError: if the files cannot be read, or a configuration beside them is malformed.
        """

    @abstractmethod
    def value(self, name: str) -> Value:
        """Read a tensor of the ledger into new memory.

        Raises:
            FormatError: if its parts contradict one another.
        """

    def read(self, name: str) -> Value:
        """Read a tensor of the ledger into new memory, like `value`."""
        return self.value(name)

    def values(self) -> dict[str, Value]:
        """Read every tensor of the ledger, by its name. Tied names share one value.

        Raises:
            FormatError: if a tensor cannot be read.
        """
        stored = {row.name: self.value(row.name) for row in self.ledger.stored}
        return {row.name: stored[row.holder] for row in self.ledger.present}

    def same(self, first: str, second: str) -> bool:
        """Tell whether two tensors of the ledger, no aliases, are equal bit for bit."""
        return same_bits(self.value(first), self.value(second))

    def check(self, check: Check) -> None:
        """Read every tensor once, so that filling a model does not fail half-way; with ``"header"``, read nothing.

        Raises:
            FormatError: if a tensor cannot be read.
            ArgumentError: for another value of `check`.
        """
        check_check(check)
        for row in self.ledger.stored if check == "digests" else ():
            self.value(row.name)


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
    def obstacles(self, source: Described) -> dict[str, str]:
        """Explain, by the name of each tensor, what readers of the format cannot take; empty if they take everything.

        Only headers and configurations are read, and the scales of a format that limits them.
        """

    def exported(self, source: Described) -> Ledger:
        """Return the fate of every tensor in the result. By default, every tensor keeps the fate that it has."""
        return source.ledger

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

    def config(self, source: Described) -> Mapping[str, Any]:
        """Return the entries that ``config.json`` beside a result needs, such as ``quantization_config``.

        They replace all quantization settings of the source.
        """
        return {}

    def check(self, source: Readable, target: Path, progress: Progress) -> None:
        """Read a result back, and compare every tensor with the source: the dequantized values must be equal.

        Raises:
            CheckpointError: naming the first tensor that differs.
        """
        result = self.open(target)
        for row in followed("validate", source.ledger.stored, progress):
            if row.name not in result.ledger:
                raise CheckpointError(f"{target}: {row.name} was not written")
            if not same_values(result.value(row.name), source.value(row.name), row):
                raise CheckpointError(f"{target}: {row.name} reads back with other values than {source.path} has")


class DirectoryExporter(Exporter):
    """An exporter that writes a directory of safetensors files.

    Args:
        allow: whether to write a checkpoint that has obstacles.
        max_shard_size: the most bytes of tensors in one file, as for `fewbits.Output`; 5 GB by default.
    """

    def __init__(self, *, allow: bool = False, max_shard_size: int | str | None = None) -> None:
        super().__init__(allow=allow)
        self.max_shard_size = MAX_SHARD_SIZE if max_shard_size is None else parse_size(max_shard_size, "max_shard_size")


def same_values(found: Value, expected: Value, row: LedgerRow) -> bool:
    """Tell whether two stored forms of a tensor give the same values in the dtype of its row, bit for bit."""
    return same_bits(*(dequantized(value, row) for value in (found, expected)))


def quantized_row(name: str, layout: Layout, spec: QuantSpec, dtype: torch.dtype, reason: str) -> LedgerRow:
    """Return the ledger row of a weight whose codes a `ForeignCheckpoint` keeps."""
    before = Entry(layout.shape, dtype).nbytes
    row = LedgerRow(name, layout.shape, dtype, "quantized", reason, before, 0, spec=spec, layout=layout)
    return CODEC.sized(row)


def kept_row(name: str, entry: Entry, reason: str = "not quantized") -> LedgerRow:
    """Return the ledger row of a tensor that a `ForeignCheckpoint` has, or returns, without codes."""
    return LedgerRow(name, entry.shape, entry.dtype, "kept", reason, entry.nbytes, entry.nbytes)


def checked(name: str, value: QuantizedTensor) -> QuantizedTensor:
    """Return a weight that was read from a file, if its scales are sound.

    Raises:
        FormatError: if a scale is NaN or infinite, or zero where the codes are not.
    """
    if value.scale.dtype in FLOAT_DTYPES and bool((value.scale == 0).any()):
        value = _without_zeros(name, value)
    if not are_sound(value.params().scale):
        raise FormatError(f"{name}: a scale is NaN or Inf; fetch the file again, or quantize the model again")
    return value


def _without_zeros(name: str, value: QuantizedTensor) -> QuantizedTensor:
    """Replace scales of 0 by 1. Some tools write a scale of 0 for a group of zeros, which fewbits never does."""
    filled = attrs.evolve(value, scale=torch.where(value.scale == 0, 1, value.scale))
    if not torch.equal(filled.dequantize(), value.dequantize()):
        raise FormatError(f"{name}: a scale is 0, but its codes are not: the scales are damaged; fetch the file again")
    return filled


def dequantized(value: Value, row: LedgerRow) -> Tensor:
    """Return the values of a stored tensor, in the dtype of its row."""
    return value.dequantize(row.dtype) if isinstance(value, QuantizedTensor) else value.to(row.dtype)
