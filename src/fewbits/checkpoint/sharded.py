"""`ShardedReader`: the tensors of one file or of several, by name, as if they were in one."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fewbits.checkpoint.folder import CheckpointFiles
from fewbits.checkpoint.serializer import ChunkReader, Entry, Reader
from fewbits.errors import FormatError


class ShardedReader:
    """Reads tensors by name from all files.

    Args:
        files: the paths, and the index if there is one.
        shards: an open reader for each file, by the file's name.

    Attributes:
        shards: the readers, by the file's name.
        entries: shape and dtype of every tensor, by name.

    Raises:
        FormatError: if two files hold a tensor of the same name.
    """

    def __init__(self, files: CheckpointFiles, shards: Mapping[str, Reader]) -> None:
        self.shards = shards
        self._files = files
        self._readers: dict[str, Reader] = {}
        for file, reader in shards.items():
            if twice := sorted(self._readers.keys() & reader.entries.keys()):
                raise FormatError(
                    f"{files.paths[0].parent}: {', '.join(twice)} in more than one of its files, {file} among them"
                )
            self._readers |= dict.fromkeys(reader.entries, reader)
        self.entries: Mapping[str, Entry] = {name: reader.entries[name] for name, reader in self._readers.items()}

    def check_index(self) -> None:
        """Refuse an index that names another file for a tensor. Tensors that the index does not mention are allowed.

        Raises:
            FormatError: naming the tensor.
        """
        for name, file in (self._files.weight_map or {}).items():
            if name not in self._readers:
                raise FormatError(f"{self._files.index} names {name}, which none of its files holds")
            if name not in self.shards[file].entries:
                raise FormatError(f"{self._files.index} says that {name} is in {file}; it is in another file")

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, headers aside."""
        return sum(entry.nbytes for entry in self.entries.values())

    def reader(self, name: str) -> Reader:
        """The reader of the file that holds a tensor."""
        return self._readers[name]

    def read(self, name: str) -> Tensor:
        """One tensor; where the format allows it, an alias of the mapped file."""
        return self._readers[name].read(name)

    def read_chunk(self, name: str, start: int, shape: tuple[int, ...]) -> Tensor:
        """Some elements of a tensor, in memory of their own; read by position where the format allows it.

        Args:
            name: of the tensor.
            start: the first element.
            shape: of the result.
        """
        reader = self._readers[name]
        if isinstance(reader, ChunkReader):
            out = torch.empty(shape, dtype=reader.entries[name].dtype, device="cpu")
            reader.read_into(name, start, out)
            return out
        return reader.read(name).reshape(-1)[start : start + math.prod(shape)].reshape(shape).clone()

    def read_whole(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        return self.read_chunk(name, 0, self.entries[name].shape)
