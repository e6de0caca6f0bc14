"""Write directories of safetensors files for other tools: without metadata of fewbits, and with a plain index."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from fewbits.checkpoint.codec import Value
from fewbits.checkpoint.raw import write_durably
from fewbits.checkpoint.safetensors import SafetensorsSerializer
from fewbits.checkpoint.serializer import Entry, Header
from fewbits.checkpoint.shards import STEM, divided, shard_name
from fewbits.formats.base import DirectoryExporter, Readable
from fewbits.selection.progress import Progress, followed
from fewbits.selection.row import LedgerRow

#: Shape and dtype of the tensors that a file holds for one weight, by their names.
Parts = Mapping[str, Entry]


class TensorFilesExporter(DirectoryExporter):
    """An exporter to safetensors files that have several tensors for each quantized weight.

    Attributes:
        written_as: the value of ``format`` in the header of each file.
    """

    written_as: ClassVar[str]

    @abstractmethod
    def entries(self, row: LedgerRow) -> Parts:
        """Describe the tensors that hold a row of `exported`."""

    @abstractmethod
    def tensors(self, row: LedgerRow, value: Value) -> Mapping[str, Tensor]:
        """Return the tensors that hold a row of `exported`, made of its value in the source."""

    def write(self, source: Readable, target: Path, progress: Progress) -> None:
        """Write all tensors, one at a time."""
        rows = {row.name: row for row in self.exported(source).stored}
        steps = followed("convert", [*rows.values()], progress)

        def read(name: str) -> Mapping[str, Tensor]:
            next(steps)
            return self.tensors(rows[name], source.value(name))

        parts = {name: self.entries(row) for name, row in rows.items()}
        metadata = {"format": self.written_as}
        write_files(target, parts, read, metadata=metadata, max_shard_size=self.max_shard_size)
        next(steps, None)  # report the last tensor as done


def write_files(
    folder: Path,
    parts: Mapping[str, Parts],
    read: Callable[[str], Mapping[str, Tensor]],
    *,
    metadata: Mapping[str, str],
    max_shard_size: int,
) -> None:
    """Write tensors, and the index if there are several files.

    Args:
        folder: an existing directory.
        parts: for each weight, the tensors that hold it. They are written to one file.
        read: returns the tensors of one weight.
        metadata: strings for the header of each file.
        max_shard_size: the most bytes of tensors in one file. A larger weight has a file of its own.

    Raises:
        CheckpointError: if a file cannot be written.
    """
    shards = divided({name: _nbytes(entries) for name, entries in parts.items()}, max_shard_size)
    serializer = SafetensorsSerializer()
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards):
        file = shard_name(index, len(shards), serializer.suffix)
        entries = {part: entry for name in names for part, entry in parts[name].items()}
        weight_map |= dict.fromkeys(entries, file)
        with serializer.writer(folder / file, Header(entries, metadata)) as writer:
            for name in names:
                for part, tensor in read(name).items():
                    writer.write(part, tensor)
            writer.seal(metadata)
            writer.close()
    if len(shards) > 1:
        index_file = {"metadata": {"total_size": sum(map(_nbytes, parts.values()))}, "weight_map": weight_map}
        text = json.dumps(index_file, indent=2) + "\n"
        write_durably(folder / f"{STEM}{serializer.suffix}.index.json", text.encode())


def _nbytes(entries: Parts) -> int:
    return sum(entry.nbytes for entry in entries.values())
