"""`Serializer`: the strategy that writes named tensors and a few strings to a file, and reads them back."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from fewbits.errors import ArgumentError
from fewbits.numerics.dtypes import dtype_name


@attrs.frozen
class Entry:
    """Shape and dtype of one stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self.numel * self.dtype.itemsize

    @property
    def in_words(self) -> str:
        """Its description in messages."""
        return f"shape {self.shape} in {dtype_name(self.dtype)}"


def find_entry(
    entries: Mapping[str, Entry], name: str, where: object, start: int = 0, chunk: Tensor | None = None
) -> Entry:
    """Return the entry of a tensor that has, from `start` on, elements such as those of `chunk`.

    Raises:
        ArgumentError: if there is no such tensor, or it has another dtype or too few elements.
    """
    if name not in entries:
        raise ArgumentError(f"{where} has no tensor named {name!r}")
    entry = entries[name]
    if chunk is not None and (chunk.dtype != entry.dtype or not 0 <= start <= start + chunk.numel() <= entry.numel):
        raise ArgumentError(
            f"{where}: {name} has no {chunk.numel()} elements in {dtype_name(chunk.dtype)} from {start} on; "
            f"it has {entry.in_words}"
        )
    return entry


@attrs.frozen
class Header:
    """The planned content of a file, known before the first tensor is written.

    Attributes:
        entries: every tensor, by name.
        metadata: strings at least as long as those passed to `Writer.seal`.
    """

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]


class Writer(AbstractContextManager["Writer"]):
    """Writes one file. Nothing is visible at its path before `close`."""

    @abstractmethod
    def write(self, name: str, tensor: Tensor) -> None:
        """Write one of the header's tensors; in any order, each once."""

    @abstractmethod
    def seal(self, metadata: Mapping[str, str]) -> Reader:
        """Finish the file with this metadata, and read it back before anyone else can."""

    @abstractmethod
    def close(self) -> None:
        """Publish the finished file at its path."""

    @abstractmethod
    def abort(self) -> None:
        """Give up and leave nothing behind. Does nothing after `close`."""

    def __exit__(self, *_: object) -> None:
        self.abort()


class ChunkWriter(Writer):
    """A writer that also takes a tensor in chunks. With any other, a tensor is held until all of it is there."""

    @abstractmethod
    def append(self, name: str, chunk: Tensor) -> None:
        """Write the next elements of one of the header's tensors, in the order they lie in, of any shape."""


class ResumableWriter(ChunkWriter):
    """A chunk writer whose unfinished file another process can resume.

    If `Serializer.resumable` has returned the writer, `abort` leaves the unfinished file where it is.
    """

    @abstractmethod
    def read_back(self, name: str, start: int, out: Tensor) -> None:
        """Fill `out`, contiguous and in CPU memory, with elements of a tensor from the unfinished file."""

    @abstractmethod
    def take_over(self, name: str, elements: int) -> None:
        """Count so many elements of a tensor, which an earlier writer has written, as written."""


class Reader(ABC):
    """Reads one file.

    Attributes:
        metadata: the strings it was sealed with.
        entries: every tensor in it.
    """

    metadata: Mapping[str, str]
    entries: Mapping[str, Entry]

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """One tensor; where the format allows it, an alias of the mapped file."""


class ChunkReader(Reader):
    """A reader that also reads a chunk of a tensor, and no more of the file for it. Any other reads whole tensors.

    Several threads may ask for chunks at the same time.
    """

    @abstractmethod
    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Fill `out`, contiguous and in CPU memory, with the elements of a tensor from `start` on, as they lie."""


class Serializer(ABC):
    """Writes and reads the result of a quantization.

    Attributes:
        suffix: the end of the names of files in a directory.
        foreign_suffixes: the ends of names, in lower case, that no file may have, because they are those of other
            formats.
    """

    suffix: ClassVar[str] = ".safetensors"
    foreign_suffixes: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def writer(self, path: str | os.PathLike[str], header: Header) -> Writer:
        """Begin a file.

        Raises:
            CheckpointError: if it cannot be begun.
        """

    @abstractmethod
    def reader(self, path: str | os.PathLike[str]) -> Reader:
        """Open a file.

        Raises:
            FormatError: if it is not in this serializer's format.
            CheckpointError: if it cannot be opened.
        """

    def resumable(self, path: str | os.PathLike[str], header: Header) -> ResumableWriter | None:
        """Begin a file at its own path, or resume the unfinished file of an earlier writer.

        No reader takes it for a file before it is sealed.

        Returns:
            None if files of this format cannot be resumed; they are then written anew.

        Raises:
            CheckpointError: if it cannot be begun.
        """
        return None
