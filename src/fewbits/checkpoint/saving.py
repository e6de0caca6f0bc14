"""Writing a result, tensor by tensor, with a digest of each, and reading it back."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fewbits.checkpoint.metadata import (
    HEADER_DIGEST_KEY,
    Metadata,
    Metrics,
    part_name,
    row_entries,
    stored_entries,
)
from fewbits.checkpoint.publishing import NewFolder
from fewbits.checkpoint.raw import tensor_bytes
from fewbits.checkpoint.serializer import Header, PartReader, Reader, Serializer
from fewbits.checkpoint.shards import plan_shards, write_index
from fewbits.errors import DigestError, FormatError
from fewbits.numerics.metrics import Measurement
from fewbits.numerics.tensor import QuantizedTensor, in_memory
from fewbits.selection.ledger import Ledger, LedgerRow

#: Bytes of a file that are looked at together.
_PIECE = 1 << 20

#: The stored form of one tensor.
Value = QuantizedTensor | Tensor


class CheckpointWriter:
    """Writes one file, a row of the ledger at a time. As a context manager it removes the file if left early."""

    def __init__(
        self,
        serializer: Serializer,
        path: str | os.PathLike[str],
        ledger: Ledger,
        *,
        architecture: str | None = None,
        extra: Mapping[str, str] | None = None,
    ) -> None:
        self._ledger, self._path = ledger, Path(path)
        self._entries = stored_entries(ledger)
        self._digests: dict[str, str] = {}
        self._metrics: dict[str, Metrics] = {}
        self._architecture, self._extra = architecture, dict(extra or {})
        placeholder = Metadata.placeholder(ledger, architecture, self._extra)
        self._writer = serializer.writer(path, Header(self._entries, placeholder.to_strings(self._entries)))

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    def abort(self) -> None:
        """Give up and leave nothing behind. Does nothing after `close`."""
        self._writer.abort()

    def put(self, row: LedgerRow, value: Value, measurement: Measurement | None = None) -> None:
        """Write the stored form of one row, which is not an alias.

        Raises:
            FormatError: if it is not what the ledger announced.
        """
        announced = row_entries(row)
        for name, tensor in value_tensors(row.name, value).items():
            if name not in announced or (tuple(tensor.shape), tensor.dtype) != (
                announced[name].shape,
                announced[name].dtype,
            ):
                raise FormatError(
                    f"{name} has shape {tuple(tensor.shape)} in {tensor.dtype}, the ledger announced "
                    f"{announced.get(name)}; the model has changed since it was quantized"
                )
            tensor = in_memory(tensor)
            self._digests[name] = digest(tensor)
            self._writer.write(name, tensor)
        if measurement is not None:
            self._metrics[row.name] = Metrics.of(measurement)

    def close(self) -> str:
        """Finish the file, read it back, check every digest, and publish it.

        Returns:
            the digest of its header.

        Raises:
            DigestError: if what is read is not what was written. Nothing is published then.
        """
        digests = {name: self._digests[name] for name in self._entries}
        metrics = {row.name: self._metrics[row.name] for row in self._ledger if row.name in self._metrics}
        metadata = Metadata(self._ledger, self._architecture, metrics, digests, extra=self._extra)
        strings = metadata.to_strings(self._entries)
        reader = self._writer.seal(strings)
        Metadata.from_strings(reader.metadata, reader.entries, self._path)
        refuse_damaged([name for name in digests if digest_in(reader, name) != digests[name]], self._path)
        self._writer.close()
        return strings[HEADER_DIGEST_KEY]


def save(
    serializer: Serializer,
    path: str | os.PathLike[str],
    ledger: Ledger,
    value_of: Callable[[str], Value],
    *,
    measurements: Mapping[str, Measurement],
    architecture: str | None = None,
    extra: Mapping[str, str] | None = None,
    max_shard_size: int | None = None,
) -> None:
    """Write a whole result to a file, or to a directory of several.

    Args:
        serializer: writes the files.
        path: where. An existing file is replaced, at once, when the new one is complete; a directory must be new.
        ledger: its rows decide what is written.
        value_of: gives the stored form of a tensor by its name.
        measurements: by tensor name; may be empty.
        architecture: the class of the model.
        extra: further strings for the header.
        max_shard_size: the most bytes of tensors in one file of a directory; None writes a single file.
    """

    def write(path: str | os.PathLike[str], ledger: Ledger) -> str:
        with CheckpointWriter(serializer, path, ledger, architecture=architecture, extra=extra) as writer:
            for row in ledger.stored:
                writer.put(row, value_of(row.name), measurements.get(row.name))
            return writer.close()

    if max_shard_size is None:
        write(path, ledger)
        return
    shards = plan_shards(ledger, max_shard_size, serializer.suffix)
    with NewFolder(path) as folder:
        digests = {shard.file: write(folder.work / shard.file, shard.ledger) for shard in shards}
        write_index(folder.work, shards, digests, serializer.suffix)
        folder.publish()


def value_tensors(name: str, value: Value) -> dict[str, Tensor]:
    """The tensors that a file holds for one value, by their names there."""
    if isinstance(value, QuantizedTensor):
        return {part_name(name, part): tensor for part, tensor in value.parts().items()}
    return {name: value}


def value_digest(value: Value) -> str:
    """One SHA-256 over all tensors of a value, in hexadecimal."""
    return hashlib.sha256("".join(map(digest, value_tensors("", value).values())).encode()).hexdigest()


def digest(tensor: Tensor) -> str:
    """SHA-256 of the bytes of a tensor, in hexadecimal."""
    tensor = in_memory(tensor)  # perhaps a copy, which has to live as long as its bytes are read
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def digest_in(reader: Reader, name: str) -> str:
    """SHA-256 of the bytes of a tensor in a file, read a piece at a time where the format allows it."""
    if not isinstance(reader, PartReader):
        return digest(reader.read(name))
    entry, found = reader.entries[name], hashlib.sha256()
    piece = torch.empty(min(entry.numel, max(1, _PIECE // entry.dtype.itemsize)), dtype=entry.dtype)
    for start in range(0, entry.numel, max(1, len(piece))):
        part = piece[: entry.numel - start]
        reader.read_into(name, start, part)
        found.update(tensor_bytes(part))
    return found.hexdigest()


def refuse_damaged(names: Sequence[str], where: object) -> None:
    """Refuse a file with damaged tensors.

    Raises:
        DigestError: naming every one of them.
    """
    if names:
        raise DigestError(
            f"{where}: the bytes of {', '.join(names)} are not the bytes that were written; the file is damaged: "
            "quantize again, or fetch it again"
        )
