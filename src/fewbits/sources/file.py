"""A checkpoint on disk as source: one file of tensors, or a directory with an index of several."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fewbits.checkpoint import torch_file
from fewbits.checkpoint.chunks import Chunk
from fewbits.checkpoint.folder import companions, find_files
from fewbits.checkpoint.metadata import is_fewbits_file, is_own_key
from fewbits.checkpoint.raw import as_checkpoint_error, copy_durably
from fewbits.checkpoint.safetensors import SafetensorsSerializer
from fewbits.checkpoint.serializer import ChunkReader, Entry, Reader
from fewbits.checkpoint.sharded import ShardedReader
from fewbits.checkpoint.torch_file import TorchFile, is_torch_file
from fewbits.errors import ArgumentError, SourceError
from fewbits.formats.foreign import refuse_foreign
from fewbits.formats.fp8 import KNOWN_BLOCKS, scaled_weights
from fewbits.nn.storage import overlaps
from fewbits.numerics.dtypes import dtype_name
from fewbits.numerics.scaled import FP8_DTYPES
from fewbits.selection.ledger import Ledger
from fewbits.sources.base import Source
from fewbits.sources.entries import entry_infos
from fewbits.sources.model_config import (
    CONFIG_FILE,
    QUANTIZATION_FILES,
    Readers,
    copy_config,
    read_block_sizes,
    read_vocabularies,
)

#: How the names of files of tensors may end, in a directory; of two kinds the first is taken.
SUFFIXES = (SafetensorsSerializer.suffix, *torch_file.SUFFIXES)


class FileSource(Source):
    """A checkpoint of safetensors files, or of PyTorch's own. Nothing but headers is read before a tensor is asked for.

    Args:
        path: a file, an index, or a directory.
        entry: the name of the state dict in each file of PyTorch's, if these hold more than that.

    Attributes:
        path: the file, index, or directory.
        folder: the directory, if a whole one was asked for.
        companions: the files of the directory that go with its tensors: configuration, tokenizer and the like.
        left_behind: files of the directory that look like weights but are not read; with FP8 weights, also the files
            that say how these are quantized.

    Raises:
        CheckpointError: if it cannot be opened.
        FormatError: if it is neither, or its index and its files contradict one another.
        SourceError: if fewbits wrote it, or another tool has quantized it.
        ArgumentError: if it has no entry of that name.
    """

    def __init__(self, path: str | os.PathLike[str], entry: str | None = None) -> None:
        self.path, self._entry = Path(path), entry
        files = find_files(self.path, SUFFIXES)
        self.folder = files.folder
        self.companions, self.left_behind = companions(files)
        self._files = files
        self._tensors = ShardedReader(files, {file.name: self._opened(file) for file in files.paths})
        self._tensors.check_index()
        strings = [pair for reader in self._tensors.shards.values() for pair in reader.metadata.items()]
        self.extra = {key: value for key, value in strings if not is_own_key(key) and key != "format"}
        self._describe()

    def _describe(self) -> None:
        """Find FP8 weights and their scales, which may be in another file, and describe every tensor."""
        entries = self._tensors.entries
        refuse_foreign(entries)
        self._scaled = scaled_weights(entries, self._stated_blocks(entries) or KNOWN_BLOCKS)
        if self._scaled:
            away = [name for name in self.companions if name in QUANTIZATION_FILES]
            self.companions = tuple(name for name in self.companions if name not in away)
            self.left_behind = tuple(sorted([*self.left_behind, *away]))
        # Tied tensors of a file of PyTorch's have one storage.
        torch_files = [reader for reader in self._tensors.shards.values() if isinstance(reader, TorchFile)]
        views = {name: view for reader in torch_files for name, view in reader.views.items()}
        self.infos = tuple(entry_infos(entries, self._scaled, views, overlaps(views)))

    def _stated_blocks(self, entries: Mapping[str, Entry]) -> tuple[tuple[int, int], ...]:
        """The blocks of FP8 weights, if the directory has a configuration that says so."""
        if self.folder is None or CONFIG_FILE not in self.companions:
            return ()
        fp8 = any(entry.dtype in FP8_DTYPES for entry in entries.values())
        return read_block_sizes(self.folder / CONFIG_FILE) if fp8 else ()

    def _opened(self, file: Path) -> ChunkReader:
        if is_torch_file(file):
            return TorchFile(file, self._entry)
        reader = SafetensorsSerializer().reader(file)
        if self._entry is not None:
            raise ArgumentError(f"entry={self._entry!r} goes with a file of torch.save; {file} is a safetensors file")
        if is_fewbits_file(reader.metadata):
            raise SourceError(f"{file} was written by fewbits and is quantized already; give the float checkpoint")
        return reader

    def read(self, name: str) -> Tensor:
        """One of its tensors, in memory of its own; an FP8 weight with scales in bfloat16.

        Raises:
            CheckpointError: if it cannot be read, or the file has changed.
            NumericsError: if its codes and scales cannot be dequantized.
        """
        return self._read(name, 0, self._tensors.entries[name].shape)

    def read_chunk(self, name: str, chunk: Chunk) -> Tensor:
        """Read some elements of a tensor, by position. Raises the same errors as `read`."""
        return self._read(name, chunk.start, chunk.described().shape)

    def _read(self, name: str, start: int, shape: tuple[int, ...]) -> Tensor:
        weight = self._scaled.get(name)
        if weight is not None:
            return weight.read(lambda part, at, stop: self._tensors.read_chunk(part, at, (stop - at,)), start, shape)
        return self._tensors.read_chunk(name, start, shape)

    def gathered_bytes(self, name: str) -> int:
        """Extra memory in bytes that reading any part of a tensor takes, besides the memory for the part itself."""
        reader = self._tensors.reader(name)
        return reader.gathered_bytes(name) if isinstance(reader, TorchFile) else 0

    def readers(self, ledger: Ledger) -> Readers | None:
        """Who can open the directory of a result; None if the source is no directory of a model of transformers."""
        if self.folder is None or CONFIG_FILE not in self.companions:
            return None
        vocabularies = read_vocabularies(self.folder / CONFIG_FILE)
        return None if vocabularies is None else Readers.of(ledger, vocabularies)

    def copy_companions(self, folder: Path, readers: Readers | None) -> None:
        """Copy the companions of the tensors to another directory. The copied configuration describes the result.

        Args:
            folder: the directory.
            readers: of the result, as `readers` gives them.

        Raises:
            CheckpointError: if it cannot be read or written.
        """
        if self.folder is None:
            return
        settings = {} if readers is None else readers.settings
        for name in self.companions:
            if name == CONFIG_FILE and (settings or self._scaled):
                copy_config(self.folder / name, folder / name, settings)
            else:
                copy_durably(self.folder / name, folder / name)

    def fingerprint(self) -> dict[str, dict[str, Any]]:
        """Identify the current state of the source's files. Only headers are read.

        Returns:
            for each file that a result is made from: its size, the time of its last change in nanoseconds, and, of one
            that holds tensors, a digest of their names, shapes and dtypes, and the entry that they are taken from.
        """
        folder = self.folder or Path()
        prints = {name: _state(folder / name) for name in self.companions}
        for path in self._files.paths:
            outline = _outline(self._tensors.shards[path.name])
            prints[path.name] = {**_state(path), "tensors": outline, "entry": self._entry}
        return prints

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of tensors."""
        return self._files.paths

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


def _state(path: Path) -> dict[str, Any]:
    with as_checkpoint_error(f"{path} cannot be read"):
        status = path.stat()
    return {"size": status.st_size, "time of change": status.st_mtime_ns}


def _outline(reader: Reader) -> str:
    entries = sorted((name, entry.shape, dtype_name(entry.dtype)) for name, entry in reader.entries.items())
    return hashlib.sha256(json.dumps([entries, sorted(reader.metadata.items())]).encode()).hexdigest()
