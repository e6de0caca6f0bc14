"""`Checkpoint`: an opened file of fewbits, or a directory of several."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import attrs

from fewbits.checkpoint.chunks import Chunk, chunks
from fewbits.checkpoint.codec import CODEC, Value, part_name
from fewbits.checkpoint.digests import refuse_damaged, wrong_digests
from fewbits.checkpoint.folder import CheckpointFiles, ShardedReader, find_files
from fewbits.checkpoint.metadata import FORMAT_VERSION, HEADER_DIGEST_KEY, VERSION_KEY, Metadata
from fewbits.checkpoint.safetensors import SafetensorsSerializer
from fewbits.checkpoint.serializer import Reader, Serializer
from fewbits.checkpoint.shards import SHARDS_KEY
from fewbits.errors import ArgumentError, FormatError
from fewbits.numerics.params import are_sound
from fewbits.numerics.parts import check_input_scale, check_shape_part
from fewbits.numerics.spec import QuantSpec
from fewbits.numerics.tensor import QuantizedTensor, same_bits
from fewbits.selection.ledger import Ledger
from fewbits.selection.row import LedgerRow

Check = Literal["digests", "header"]

#: Scales that are looked at together.
_PIECE = 1 << 18


class Checkpoint:
    """A file of fewbits, or a directory of several. Opening checks the structure; `check` also checks digests.

    Args:
        path: the file, the directory, or the index in it.
        serializer: reads the files; None means safetensors.

    Attributes:
        metadata: the metadata of all files, united.
        ledger: the fate of every tensor of the source.
        headers: the digest in each file's header, by the name of the file.
        nbytes: the bytes of all tensors, without headers.

    Raises:
        FormatError: if fewbits did not write it, or its parts contradict one another.
        DigestError: if a header is damaged.
        CheckpointError: if it cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str], serializer: Serializer | None = None) -> None:
        self.path = path
        serializer = serializer or SafetensorsSerializer()
        files = find_files(Path(path), (serializer.suffix,))
        readers = {file.name: serializer.reader(file) for file in files.paths}
        opened = zip(files.paths, readers.values(), strict=True)
        parts = [Metadata.from_strings(reader.metadata, reader.entries, file) for file, reader in opened]
        self.headers = {file: reader.metadata[HEADER_DIGEST_KEY] for file, reader in readers.items()}
        if files.weight_map is not None:
            _check_index(files, readers, self.headers)
        self.metadata = _united(parts, path)
        self.ledger = self.metadata.ledger
        self._tensors = ShardedReader(files, readers)
        self.nbytes = self._tensors.nbytes

    def value(self, name: str) -> Value:
        """The stored form of one tensor of the source, by its name there; it aliases the mapped file.

        Raises:
            ArgumentError: if the source had none of that name, or it is merged into another.
        """
        row = self.ledger[self.ledger[name].holder]
        if row.merged_into is not None:
            raise ArgumentError(f"{name} is not in {self.path}: it is merged into {row.merged_into}")
        return CODEC.decode(row, self._tensors.read)

    def chunk(self, chunk: Chunk) -> Value:
        """The stored form of some of a tensor, in memory of its own; read by position where the format allows it.

        Args:
            chunk: a chunk of a row of this ledger; the row is not an alias.

        Raises:
            FormatError: with the first chunk, if the stored shape is not that of the ledger.
        """
        return CODEC.decode_chunk(chunk, self._tensors.read_chunk)

    def read(self, name: str) -> Value:
        """The stored form of one tensor in memory of its own; the name is that of a row that is not an alias."""
        return self.chunk(Chunk.whole(self.ledger[name]))

    def same(self, first: str, second: str) -> bool:
        """Whether two rows of the ledger, no aliases, are equal bit for bit; a chunk of each is read at a time."""
        one, other = self.ledger[first], self.ledger[second]
        described = [(row.shape, row.dtype, row.spec, row.layout) for row in (one, other)]
        pairs = zip(chunks(one), chunks(other), strict=True)
        return described[0] == described[1] and all(same_bits(self.chunk(a), self.chunk(b)) for a, b in pairs)

    def damaged(self) -> list[str]:
        """The names, in the files, of all tensors whose bytes do not have their digest."""
        readers = self._tensors.shards.values()
        return [name for reader in readers for name in wrong_digests(reader, self.metadata.digests)]

    def check(self, check: Check) -> None:
        """Check every digest, scale and code, or, with ``"header"``, little more than was checked on opening.

        A file that passes can be read, so filling a model does not fail half-way.

        Raises:
            DigestError: naming the damaged tensors.
            FormatError: naming the tensors with scales that are zero, NaN or Inf, or with codes that have no level; or
                if a shape is stated twice, and not the same, or a scale of inputs is not a positive number.
            ArgumentError: for another value of `check`.
        """
        check_check(check)
        if check == "digests":
            refuse_damaged(self.damaged(), self.path)
            if unsound := [row.name for row in self.ledger.stored if not self._is_sound(row)]:
                raise FormatError(f"{self.path}: a scale is zero, NaN or Inf, of {', '.join(unsound)}; quantize again")
            if invalid := [row.name for row in self.ledger.stored if not self._has_valid_codes(row)]:
                raise FormatError(f"{self.path}: a code has no level, of {', '.join(invalid)}; quantize again")
        for row in self.ledger.stored:
            if isinstance(row.spec, QuantSpec):
                check_shape_part(self._tensors.read_whole(part_name(row.name, "shape")), row.shape)
                if (name := part_name(row.name, "input_scale")) in CODEC.entries(row):
                    check_input_scale(self._tensors.read_whole(name))

    def _is_sound(self, row: LedgerRow) -> bool:
        """Whether no scale of a tensor is zero, NaN or Inf; true for a tensor without scales."""
        if not isinstance(row.spec, QuantSpec):
            return True
        name = part_name(row.name, "scale")
        count = self._tensors.entries[name].numel
        return all(
            are_sound(self._tensors.read_chunk(name, start, (min(_PIECE, count - start),)))
            for start in range(0, count, _PIECE)
        )

    def _has_valid_codes(self, row: LedgerRow) -> bool:
        """Whether every code of a tensor has a level; true where the spec gives every code a meaning."""
        if not isinstance(row.spec, QuantSpec) or not row.spec.invalid_codes:
            return True
        values = map(self.chunk, chunks(row))
        return all(value.has_valid_codes() for value in values if isinstance(value, QuantizedTensor))

    def values(self) -> dict[str, Value]:
        """The stored form of every tensor of the source but those merged into others; tied names share one object."""
        stored = {row.name: self.value(row.name) for row in self.ledger.stored}
        return {row.name: stored[row.holder] for row in self.ledger.present}


def check_check(check: object) -> None:
    """Refuse a value of `check` that `load` does not know.

    Raises:
        ArgumentError: naming the values that it knows.
    """
    if check not in ("digests", "header"):
        raise ArgumentError(f"check must be 'digests' or 'header', not {check!r}")


def _check_index(files: CheckpointFiles, readers: Mapping[str, Reader], headers: Mapping[str, str]) -> None:
    """Refuse files that do not belong together.

    Raises:
        FormatError: if the index names the wrong file for a tensor, or was written for other files.
    """
    where, version = files.folder, files.metadata.get(VERSION_KEY)
    if version != str(FORMAT_VERSION):
        raise FormatError(f"{where} has format version {version}; this release of fewbits reads {FORMAT_VERSION}")
    total = sum(entry.nbytes for reader in readers.values() for entry in reader.entries.values())
    if files.metadata.get(SHARDS_KEY) != headers or files.metadata.get("total_size") != total:
        raise FormatError(f"{where}: the index was written for other files; fetch all files again")
    found = {name: file for file, reader in readers.items() for name in reader.entries}
    if odd := sorted(found.items() ^ dict(files.weight_map or {}).items()):
        raise FormatError(f"{where}: {odd[0][0]} is not in the file that the index names")


def _united(all_metadata: Sequence[Metadata], where: object) -> Metadata:
    """Unite the metadata of several files."""
    first = all_metadata[0]
    if len(all_metadata) == 1:
        return first
    try:
        ledger = Ledger(row for metadata in all_metadata for row in metadata.ledger)
    except ArgumentError as error:
        raise FormatError(f"{where}: its files contradict one another: {error}") from None
    return attrs.evolve(
        first,
        ledger=ledger,
        metrics={name: metrics for metadata in all_metadata for name, metrics in metadata.metrics.items()},
        digests={name: digest for metadata in all_metadata for name, digest in metadata.digests.items()},
        output_sqnr_db={name: db for metadata in all_metadata for name, db in metadata.output_sqnr_db.items()},
    )
