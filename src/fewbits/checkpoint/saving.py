"""Writing a result, tensor by tensor, with a digest of each, and reading it back."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import attrs
import torch
from torch import Tensor

from fewbits.checkpoint.chunks import Chunk
from fewbits.checkpoint.codec import CODEC, Value
from fewbits.checkpoint.digests import pieces, refuse_damaged, wrong_digests
from fewbits.checkpoint.journal import Note
from fewbits.checkpoint.metadata import HEADER_DIGEST_KEY, Metadata, Metrics, stored_entries
from fewbits.checkpoint.publishing import check_name_and_parent, published
from fewbits.checkpoint.serializer import ChunkWriter, Entry, Header, ResumableWriter, Serializer
from fewbits.checkpoint.shards import STEM, plan_shards, write_index
from fewbits.errors import FormatError
from fewbits.numerics.metrics import Measurement
from fewbits.numerics.plain import plain
from fewbits.numerics.tensor import QuantizedTensor, in_memory, tensor_bytes
from fewbits.selection.ledger import Ledger
from fewbits.selection.row import LedgerRow


class CheckpointWriter(AbstractContextManager["CheckpointWriter"]):
    """Writes one file, a chunk at a time. If the `with` block ends before `close`, it gives up.

    Args:
        serializer: the format of the file.
        path: the path of the file.
        about: the metadata of the file, without digests.
        resumable: whether an unfinished file stays at `path`, for a later writer, if the serializer can resume it.
            Otherwise an unfinished file is removed.
    """

    def __init__(
        self, serializer: Serializer, path: str | os.PathLike[str], about: Metadata, *, resumable: bool = False
    ) -> None:
        self._about, self._path = about, Path(path)
        self._entries = stored_entries(about.ledger)
        self._rows = {row.name: row for row in about.ledger.stored}
        self._hashes = {name: hashlib.sha256() for name in self._entries}
        self._counts = dict.fromkeys(self._entries, 0)
        self._held: dict[str, list[Tensor]] = {}
        header = Header(self._entries, about.placeholder_strings())
        resumed = serializer.resumable(path, header) if resumable else None
        self._writer = resumed or serializer.writer(path, header)

    def __exit__(self, *_: object) -> None:
        self._writer.abort()

    def take_over(self, notes: Iterable[Note]) -> list[Note]:
        """Continue where an earlier process stopped: accept its notes as far as they agree with the bytes in the file.

        Returns:
            the notes of chunks that need not be written again; those of each tensor are consecutive from its beginning.
        """
        if not isinstance(self._writer, ResumableWriter):
            return []
        stops: dict[str, int] = {}
        taken = []
        for note in notes:
            if note.start == stops.get(note.tensor, 0) and self._take_over(self._writer, note):
                stops[note.tensor] = note.stop
                taken.append(note)
        return taken

    def _take_over(self, writer: ResumableWriter, note: Note) -> bool:
        """Compare the file with a note; if they agree, the note's chunk counts as written."""
        row = self._rows.get(note.tensor)
        if row is None or note.written.keys() != CODEC.entries(row).keys() or not note.start <= note.stop:
            return False
        hashes = {}
        for name, (elements, expected) in note.written.items():
            if not self._counts[name] <= elements <= self._entries[name].numel:
                return False
            hashes[name] = found = self._hashes[name].copy()
            for start, out in pieces(self._entries[name], self._counts[name], elements):
                writer.read_back(name, start, out)
                found.update(tensor_bytes(out))
            if found.hexdigest() != expected:
                return False
        self._hashes |= hashes
        for name, (elements, _) in note.written.items():
            self._counts[name] = elements
            writer.take_over(name, elements)
        return True

    def written(self, row: LedgerRow) -> dict[str, tuple[int, str]]:
        """How many elements of each tensor that the file holds for a row are written, and their SHA-256."""
        return {name: (self._counts[name], self._hashes[name].hexdigest()) for name in CODEC.entries(row)}

    def append(self, chunk: Chunk, value: Value) -> None:
        """Write the stored form of the next chunk of a row.

        Raises:
            FormatError: if its shapes or dtypes are not those of the ledger.
        """
        announced = CODEC.entries(chunk.described())
        tensors = CODEC.encode(chunk.row.name, value)
        for name, tensor in tensors.items():
            if announced.get(name) != Entry(tuple(tensor.shape), tensor.dtype):
                raise FormatError(
                    f"{name} has shape {tuple(tensor.shape)} in {tensor.dtype}, the ledger announced "
                    f"{announced.get(name)}; the model has changed since it was quantized"
                )
        for name, tensor in CODEC.for_chunk(chunk, tensors).items():
            tensor = in_memory(tensor)
            self._hashes[name].update(tensor_bytes(tensor))
            self._write(chunk, name, tensor)
            self._counts[name] += tensor.numel()

    def _write(self, chunk: Chunk, name: str, tensor: Tensor) -> None:
        entry = self._entries[name]
        if tensor.numel() == entry.numel:
            self._writer.write(name, tensor.reshape(entry.shape))
        elif isinstance(self._writer, ChunkWriter):
            self._writer.append(name, tensor)
        else:
            self._held.setdefault(name, []).append(tensor.reshape(-1))
            if chunk.is_last:
                self._writer.write(name, torch.cat(self._held.pop(name)).reshape(entry.shape))

    def close(self, measured: Mapping[str, Measurement], threads: int | None = None) -> str:
        """Finish the file, read it back, check every digest, and publish it.

        Args:
            measured: how tensors compare with their sources, by name, for the header; may be empty, or hold others too.
            threads: how many tensors are read back at a time; see `wrong_digests`.

        Returns:
            the digest of its header.

        Raises:
            DigestError: if the file does not hold the bytes that were written. Nothing is published then.
        """
        digests = {name: found.hexdigest() for name, found in self._hashes.items()}
        metrics = {name: self._about.metrics[name] for name in self._rows if name in self._about.metrics}
        metrics |= {row.name: Metrics.of(measured[row.name]) for row in self._about.ledger if row.name in measured}
        strings = attrs.evolve(self._about, metrics=metrics, digests=digests).to_strings(self._entries)
        reader = self._writer.seal(strings)
        if (reader.metadata, reader.entries) != (strings, self._entries):
            # A serializer may add strings. Any other difference is refused here, with the reason.
            Metadata.from_strings(reader.metadata, reader.entries, self._path)
        refuse_damaged(wrong_digests(reader, digests, threads), self._path)
        self._writer.close()
        return strings[HEADER_DIGEST_KEY]


def save(
    serializer: Serializer,
    path: str | os.PathLike[str],
    about: Metadata,
    value_of: Callable[[str], Value],
    *,
    measured: Mapping[str, Measurement],
    max_shard_size: int | None = None,
    stem: str = STEM,
) -> None:
    """Write a whole result to a file, or to a directory of several.

    Args:
        serializer: the format of the files.
        path: the path of the result. An existing file is replaced, at once, when the new one is complete; a directory
            must be new.
        about: the metadata of the result, without digests.
        value_of: returns the stored form of a tensor, by its name.
        measured: how tensors compare with their sources, by name; may be empty.
        max_shard_size: the most bytes of tensors in one file of a directory; None writes a single file.
        stem: the beginning of the names of files in a directory.

    Raises:
        ArgumentError: if the name of a file is that of another kind, or that of a directory is the name of a file.
        CheckpointError: if the directory that it would be in does not exist, or it cannot be written.
    """
    check_name_and_parent(Path(path), serializer, folder=max_shard_size is not None)

    def write(path: str | os.PathLike[str], ledger: Ledger) -> str:
        with CheckpointWriter(serializer, path, attrs.evolve(about, ledger=ledger)) as writer:
            for row in ledger.stored:
                writer.append(Chunk.whole(row), value_of(row.name))
            return writer.close(measured)

    if max_shard_size is None:
        write(path, about.ledger)
        return
    shards = plan_shards(about.ledger, max_shard_size, serializer.suffix, stem)
    with published(Path(path), folder=True, replace=False) as folder:
        digests = {shard.file: write(folder / shard.file, shard.ledger) for shard in shards}
        write_index(folder, shards, digests, serializer.suffix, stem)


def plain_value(name: str, value: Value) -> Value:
    """The same value, if it is made of plain tensors.

    Raises:
        SourceError: naming the tensor that is not plain.
    """
    tensors = {part: plain(tensor, part) for part, tensor in CODEC.encode(name, value).items()}
    return value if isinstance(value, QuantizedTensor) else tensors[name]
