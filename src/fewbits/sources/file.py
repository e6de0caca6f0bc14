"""`FileSource`: a checkpoint on disk, either one file of tensors or a directory of several files with an index."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from fewbits._events import emit
from fewbits.checkpoint import torch_file
from fewbits.checkpoint.chunks import Chunk
from fewbits.checkpoint.folder import ShardedReader, companions, find_files
from fewbits.checkpoint.metadata import VERSION_KEY, is_own_key
from fewbits.checkpoint.raw import as_checkpoint_error, copy_durably
from fewbits.checkpoint.safetensors import SafetensorsSerializer
from fewbits.checkpoint.serializer import ChunkReader, Reader
from fewbits.checkpoint.torch_file import TorchFile, is_torch_file
from fewbits.errors import ArgumentError, SourceError
from fewbits.formats.foreign import refuse_foreign
from fewbits.formats.fp8 import KNOWN_BLOCKS, scaled_weights
from fewbits.formats.model_config import (
    QUANTIZATION_FILES,
    Readers,
    copy_config,
    read_block_sizes,
)
from fewbits.formats.settings import CONFIG_FILE, QUANTIZATION_KEYS
from fewbits.nn.storage import overlaps
from fewbits.numerics.dtypes import dtype_name
from fewbits.numerics.scaled import FP8_DTYPES
from fewbits.selection.ledger import Ledger
from fewbits.sources.base import Source
from fewbits.sources.entries import entry_infos

#: Suffixes of tensor files in a directory. If files of several kinds exist, the first kind in this list is used.
SUFFIXES = (SafetensorsSerializer.suffix, *torch_file.SUFFIXES)


class FileSource(Source):
    """A checkpoint of safetensors files or of files that `torch.save` wrote. Tensors are read only when requested.

    Args:
        path: a file, an index, or a directory.
        entry: the name of the state dict within each `torch.save` file, if the files hold more than a state dict.

    Attributes:
        path: the given path.
        files: the tensor files.
        folder: the directory if the path is a directory or an index; None for a single file.
        companions: files in the directory to copy along with the tensors: configuration, tokenizer and the like.
        left_behind: files in the directory that are not copied: weights that the source does not use and, beside FP8
            weights, files that state how the weights are quantized.

    Raises:
        CheckpointError: if the checkpoint cannot be opened.
        FormatError: if the files are of neither kind, or the index contradicts them.
        SourceError: if fewbits or another tool quantized the checkpoint.
        ArgumentError: if the files have no entry of that name.
    """

    def __init__(self, path: str | os.PathLike[str], entry: str | None = None) -> None:
        self.path, self._entry = Path(path), entry
        found = find_files(self.path, SUFFIXES)
        self.folder, self.files = found.folder, found.paths
        self.companions, self.left_behind = companions(found)
        # Without a folder there are no companions.
        self._home = self.folder or Path()
        self._config = self._home / CONFIG_FILE if CONFIG_FILE in self.companions else None
        self._tensors = ShardedReader(found, {file.name: self._opened(file) for file in self.files})
        self._tensors.check_index()
        readers, entries = self._tensors.shards.values(), self._tensors.entries
        strings = [pair for reader in readers for pair in reader.metadata.items()]
        self.extra = {key: value for key, value in strings if not is_own_key(key) and key != "format"}
        refuse_foreign(entries)
        # A weight and its scales may be in different files.
        self._scaled = scaled_weights(entries, self._stated_blocks() or KNOWN_BLOCKS)
        if self._scaled:
            away = [name for name in self.companions if name in QUANTIZATION_FILES]
            self.companions = tuple(name for name in self.companions if name not in away)
            self.left_behind = tuple(sorted([*self.left_behind, *away]))
        # Tied tensors in a `torch.save` file share one storage.
        views = {
            name: view for reader in readers if isinstance(reader, TorchFile) for name, view in reader.views.items()
        }
        self.infos = tuple(entry_infos(entries, self._scaled, views, overlaps(views)))

    def _stated_blocks(self) -> tuple[tuple[int, int], ...]:
        """Block shapes of FP8 weights, as far as the directory's configuration states them."""
        fp8 = any(entry.dtype in FP8_DTYPES for entry in self._tensors.entries.values())
        return read_block_sizes(self._config) if fp8 and self._config is not None else ()

    def _opened(self, file: Path) -> ChunkReader:
        if is_torch_file(file):
            return TorchFile(file, self._entry)
        reader = SafetensorsSerializer().reader(file)
        if self._entry is not None:
            raise ArgumentError(f"entry={self._entry!r} needs a file of torch.save; {file} is a safetensors file")
        if VERSION_KEY in reader.metadata:
            raise SourceError(f"{file} was written by fewbits and is quantized already; give the float checkpoint")
        return reader

    def read(self, name: str) -> Tensor:
        """Read one tensor into new memory. FP8 weights with scales are dequantized to bfloat16.

        Raises:
            CheckpointError: if the tensor cannot be read, or the file has changed.
            NumericsError: if its codes and scales cannot be dequantized.
        """
        return self._read(name, 0, self._tensors.entries[name].shape)

    def read_chunk(self, name: str, chunk: Chunk) -> Tensor:
        """Read a chunk of one tensor without the rest; raises the same errors as `read`."""
        return self._read(name, chunk.start, chunk.described().shape)

    def _read(self, name: str, start: int, shape: tuple[int, ...]) -> Tensor:
        read, weight = self._tensors.read_chunk, self._scaled.get(name)
        return read(name, start, shape) if weight is None else weight.read(read, start, shape)

    def gathered_bytes(self, name: str) -> int:
        """Return the temporary memory needed to read any part of a tensor, beyond the memory for the result."""
        reader = self._tensors.reader(name)
        return reader.gathered_bytes(name) if isinstance(reader, TorchFile) else 0

    def readers(self, ledger: Ledger) -> Readers | None:
        """Return which libraries can open the result; None if the source is not a transformers model directory."""
        return Readers.beside(self._config, ledger)

    def copy_companions(self, folder: Path, readers: Readers | None) -> None:
        """Copy the companion files to another directory, with the result's quantization settings in ``config.json``.

        Args:
            folder: the directory to copy to.
            readers: the return value of `readers` for the result.

        Raises:
            CheckpointError: if a file cannot be read or written.
        """
        settings = {} if readers is None else readers.settings
        for name in self.companions:
            if name == CONFIG_FILE and (settings or self._scaled):
                entries = {QUANTIZATION_KEYS[0]: settings} if settings else {}
                if removed := copy_config(self._home / name, folder / name, entries):
                    reason = "it describes the weights of the source, not of the result"
                    emit("warning", "config_changed", file=str(self._config), removed=removed, reason=reason)
            else:
                copy_durably(self._home / name, folder / name)

    def fingerprint(self) -> dict[str, dict[str, Any]]:
        """Return data that changes when the checkpoint changes, without reading more than headers.

        Returns:
            for each file that the result depends on: its size and the time of its last change in nanoseconds; for
            tensor files also a digest of names, shapes and dtypes, and the entry that the tensors are read from.
        """
        prints = {name: _state(self._home / name) for name in self.companions}
        for path in self.files:
            outline = _outline(self._tensors.shards[path.name])
            prints[path.name] = {**_state(path), "tensors": outline, "entry": self._entry}
        return prints

    def prepared(self) -> Path:
        """Return the path; a file cannot be run."""
        return self.path

    def refuse_output(self, path: Path, *, folder: bool) -> None:
        """Refuse an output path where the result would overwrite the source or lie inside of it.

        Args:
            path: the output path.
            folder: whether the result is a directory.

        Raises:
            ArgumentError: if the path is refused.
        """
        with as_checkpoint_error(f"{path} cannot be written"):
            target = Path(os.path.realpath(path))
        if os.path.exists(target) and any(os.path.samefile(target, mine) for mine in (self.path, *self.files)):
            raise ArgumentError(f"{path} is the source itself; give another path to write to")
        if not folder and os.path.isdir(target):
            raise ArgumentError(f"{path} is a directory; give the path of the file to write")
        own = [Path(os.path.realpath(mine)) for mine in (self.path, *self.files)]
        if folder and any(target in mine.parents for mine in own):
            raise ArgumentError(f"{path} holds the source, which would be lost; give another path to write to")
        if self.folder is not None and Path(os.path.realpath(self.folder)) in (target, *target.parents):
            raise ArgumentError(f"{path} is inside of the source directory; give a path outside of it")


def _state(path: Path) -> dict[str, Any]:
    with as_checkpoint_error(f"{path} cannot be read"):
        status = path.stat()
    return {"size": status.st_size, "time of change": status.st_mtime_ns}


def _outline(reader: Reader) -> str:
    entries = sorted((name, entry.shape, dtype_name(entry.dtype)) for name, entry in reader.entries.items())
    return hashlib.sha256(json.dumps([entries, sorted(reader.metadata.items())]).encode()).hexdigest()
