"""A checkpoint on disk as source: one file of tensors, or a directory with an index of several."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.checkpoint import torch_file
from fewbits.checkpoint.chunks import Chunk
from fewbits.checkpoint.folder import companions, find_files
from fewbits.checkpoint.metadata import is_fewbits_file, is_own_key
from fewbits.checkpoint.raw import as_checkpoint_error, copy_durably
from fewbits.checkpoint.safetensors import SafetensorsSerializer
from fewbits.checkpoint.serializer import ChunkReader
from fewbits.checkpoint.torch_file import TorchFile, is_torch_file
from fewbits.errors import ArgumentError, FormatError, SourceError
from fewbits.nn.storage import overlaps
from fewbits.numerics.dtypes import dtype_name
from fewbits.selection.info import TensorInfo
from fewbits.sources.base import Source
from fewbits.sources.mapping import entry_info, refuse_quantized_entries

#: How the names of files of tensors may end, in a directory; of two kinds the first is taken.
SUFFIXES = (SafetensorsSerializer.suffix, *torch_file.SUFFIXES)


class FileSource(Source):
    """A checkpoint of safetensors files, or of PyTorch's own. Nothing but headers is read before a tensor is asked for.

    Attributes:
        path: what was given: a file, an index, or a directory.
        folder: the directory, if a whole one was asked for.
        companions: the files of the directory that go with its tensors: configuration, tokenizer and the like.
        left_behind: files of the directory that look like weights and are not those that the tensors are taken from.

    Raises:
        CheckpointError: if it cannot be opened.
        FormatError: if it is neither, or its index and its files contradict one another.
        SourceError: if fewbits wrote it, or another tool has quantized it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        files = find_files(self.path, SUFFIXES)
        self.folder = files.folder
        self.companions, self.left_behind = companions(files)
        self._readers: dict[str, ChunkReader] = {}
        self._readers_by_file: dict[str, ChunkReader] = {}
        self._files = files
        self.extra = {}
        for file in files.paths:
            self._add(file)
        self._check_index()
        self.infos = tuple(_infos(self._readers))
        refuse_quantized_entries(self.infos)

    def _add(self, file: Path) -> None:
        reader = TorchFile(file) if is_torch_file(file) else SafetensorsSerializer().reader(file)
        if is_fewbits_file(reader.metadata):
            raise SourceError(f"{file} was written by fewbits and is quantized already; give the float checkpoint")
        if twice := sorted(self._readers.keys() & reader.entries.keys()):
            raise FormatError(f"{self.path}: {', '.join(twice)} in more than one of its files, {file.name} among them")
        own = {key: value for key, value in reader.metadata.items() if not is_own_key(key) and key != "format"}
        self.extra = {**self.extra, **own}
        self._readers |= dict.fromkeys(reader.entries, reader)
        self._readers_by_file[file.name] = reader

    def _check_index(self) -> None:
        """Refuse an index that says otherwise than its files; what it does not mention is carried through."""
        for name, file in (self._files.weight_map or {}).items():
            if name not in self._readers:
                raise FormatError(f"{self._files.index} names {name}, which none of its files holds")
            if name not in self._readers_by_file[file].entries:
                raise FormatError(f"{self._files.index} says that {name} is in {file}; it is in another file")

    def read(self, name: str) -> Tensor:
        """One of its tensors, in memory of its own."""
        entry = self._readers[name].entries[name]
        return self._read(name, 0, entry.shape, entry.dtype)

    def read_chunk(self, name: str, chunk: Chunk) -> Tensor:
        """Some elements of one of its tensors, read by position."""
        row = chunk.described()
        return self._read(name, chunk.start, row.shape, row.dtype)

    def _read(self, name: str, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        reader = self._readers[name]
        out = torch.empty(shape, dtype=dtype, device="cpu")
        reader.read_into(name, start, out)
        return out

    def copy_companions(self, folder: Path) -> None:
        """Copy what goes with the tensors to another directory.

        Raises:
            CheckpointError: if it cannot be read or written.
        """
        if self.folder is None:
            return
        for name in self.companions:
            copy_durably(self.folder / name, folder / name)

    def fingerprint(self) -> dict[str, list[Any]]:
        """What tells this state of it from another, without reading more than headers.

        Returns:
            for each file that a result is made from: its size, the time of its last change in nanoseconds, and, of one
            that holds tensors, a digest of their names, shapes and dtypes.
        """
        folder = self.folder or Path()
        prints = {path.name: [*_state(path), _outline(self._readers_by_file[path.name])] for path in self._files.paths}
        return prints | {name: _state(folder / name) for name in self.companions}

    def prepared(self) -> Path:
        """The path: there is nothing to run."""
        return self.path

    def refuse_output(self, path: Path, *, folder: bool) -> None:
        """Refuse a place for the result where it would replace the source, or become a part of it.

        Args:
            path: where it would be written.
            folder: whether as a directory.

        Raises:
            ArgumentError: saying what is there.
        """
        with as_checkpoint_error(f"{path} cannot be written"):
            target = Path(os.path.realpath(path))
        if self.is_file(target):
            raise ArgumentError(f"{path} is the source itself; give another path to write to")
        if not folder and os.path.isdir(target):
            raise ArgumentError(f"{path} is a directory; give the path of the file to write")
        own = [Path(os.path.realpath(mine)) for mine in (self.path, *self._files.paths)]
        if folder and any(target in mine.parents for mine in own):
            raise ArgumentError(f"{path} holds the source, which would be gone; give another path to write to")
        if self.folder is not None and Path(os.path.realpath(self.folder)) in (target, *target.parents):
            raise ArgumentError(f"{path} is inside of the source directory; give a path outside of it")

    def is_file(self, path: str | os.PathLike[str]) -> bool:
        """Whether something at that path belongs to it, under any of its names."""
        if not os.path.exists(path):
            return False
        return any(os.path.samefile(path, mine) for mine in (self.path, *self._files.paths))


def _state(path: Path) -> list[Any]:
    with as_checkpoint_error(f"{path} cannot be read"):
        status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _outline(reader: ChunkReader) -> str:
    entries = sorted((name, entry.shape, dtype_name(entry.dtype)) for name, entry in reader.entries.items())
    return hashlib.sha256(json.dumps([entries, sorted(reader.metadata.items())]).encode()).hexdigest()


def _infos(readers: Mapping[str, ChunkReader]) -> Iterator[TensorInfo]:
    """What is known of every tensor, by name; tied ones of a file of PyTorch's have one storage."""
    views = {name: reader.views[name] for name, reader in readers.items() if isinstance(reader, TorchFile)}
    overlapping = overlaps(views)
    for name, reader in sorted(readers.items()):
        entry = reader.entries[name]
        obstacle = overlapping.get(name)
        yield entry_info(name, entry.shape, entry.dtype, storage=views.get(name), obstacle=obstacle)
