"""A checkpoint on disk as source, a file as result; tensors stream from one to the other."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor

from fewbits.checkpoint.metadata import is_fewbits_file, is_own_key
from fewbits.checkpoint.reading import Checkpoint
from fewbits.checkpoint.safetensors import SafetensorsSerializer
from fewbits.checkpoint.saving import CheckpointWriter, Value
from fewbits.checkpoint.serializer import Serializer
from fewbits.errors import ArgumentError, SourceError
from fewbits.numerics.metrics import Measurement
from fewbits.selection.ledger import Ledger, LedgerRow
from fewbits.sources.base import Source, Target
from fewbits.sources.mapping import entry_info, refuse_quantized_entries


class FileSource(Source):
    """A safetensors checkpoint.

    Raises:
        CheckpointError: if it cannot be opened.
        FormatError: if it is not a safetensors file.
        SourceError: if fewbits wrote it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._reader = SafetensorsSerializer().reader(path)
        metadata = self._reader.metadata
        if is_fewbits_file(metadata):
            raise SourceError(f"{path} was written by fewbits and is quantized already; give the float checkpoint")
        self.extra = {key: value for key, value in metadata.items() if not is_own_key(key) and key != "format"}
        self.infos = tuple(entry_info(name, e.shape, e.dtype) for name, e in sorted(self._reader.entries.items()))
        refuse_quantized_entries(self.infos)

    def read(self, name: str) -> Tensor:
        """One of its tensors, an alias of the mapped file."""
        return self._reader.read(name)

    def prepared(self) -> Path:
        """The path: there is nothing to run."""
        return self.path

    def is_file(self, path: str | os.PathLike[str]) -> bool:
        """Whether this is the file at that path, under any of its names."""
        return os.path.exists(path) and os.path.samefile(path, self.path)

    def target(self, ledger: Ledger, serializer: Serializer, output: str | os.PathLike[str] | None) -> Target:
        """A file that appears at `output` when it is complete."""
        if output is None:
            raise ArgumentError(f"quantizing the file {self.path} needs output=, the path of the file to write")
        if self.is_file(output):
            raise ArgumentError(f"{output} is the source itself; give another path to write to")
        return FileTarget(output, CheckpointWriter(serializer, output, ledger, extra=self.extra), serializer)


class FileTarget(Target):
    """A file that is being written, and the finished file."""

    def __init__(self, output: str | os.PathLike[str], writer: CheckpointWriter, serializer: Serializer) -> None:
        self._output, self._writer, self._serializer = Path(output), writer, serializer
        self._checkpoint: Checkpoint | None = None
        self._written: dict[str, str] = {}

    def put(self, row: LedgerRow, value: Value, measurement: Measurement | None) -> None:
        self._writer.put(row, value, measurement)

    @property
    def output(self) -> Path:
        """Where it is, or will be."""
        return self._output

    def finish(self) -> Path:
        self._writer.close()
        self._written = dict(self._opened().metadata.digests)
        return self._output

    def is_as_written(self) -> bool:
        return dict(Checkpoint(self._output, self._serializer).metadata.digests) == self._written

    def abort(self) -> None:
        self._writer.abort()

    def value(self, name: str) -> Value:
        return self._opened().value(name)

    def _opened(self) -> Checkpoint:
        if self._checkpoint is None:
            self._checkpoint = Checkpoint(self._output, self._serializer)
        return self._checkpoint
