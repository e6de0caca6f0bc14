"""The files of a checkpoint: one file, or a directory with an index of several; and a reader of all of them.

An index is checked too: it may name only files in its own directory.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from fewbits.checkpoint.header import MAX_HEADER, parse_object
from fewbits.checkpoint.raw import as_checkpoint_error
from fewbits.checkpoint.serializer import ChunkReader, Entry, Reader
from fewbits.errors import CheckpointError, FormatError

#: How names of files end that hold tensors as other formats do.
FOREIGN_SUFFIXES = (
    ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".onnx_data", ".npz",
    ".npy", ".pkl", ".tflite", ".engine",
)  # fmt: skip

#: How names of files end that hold tensors.
WEIGHT_SUFFIXES = (".safetensors", *FOREIGN_SUFFIXES)

#: One of several files, by its name.
_SHARD = re.compile(r"-\d+-of-(?!0*1\.)\d+\.")


@attrs.frozen
class CheckpointFiles:
    """Where the tensors of a checkpoint are.

    Attributes:
        paths: the files, in the order of their names.
        folder: the directory, if a whole one was asked for; None for a single file.
        index: the file that says where each tensor is; None without one.
        weight_map: the file's name for every tensor, as the index has it; None without an index.
        metadata: further entries of the index.
    """

    paths: tuple[Path, ...]
    folder: Path | None = None
    index: Path | None = None
    weight_map: Mapping[str, str] | None = None
    metadata: Mapping[str, Any] = attrs.field(factory=dict)


class ShardedReader:
    """Reads tensors by name from all files.

    Args:
        files: the paths, and the index if there is one.
        shards: an open reader for each file, by the file's name.

    Attributes:
        shards: the readers, by the file's name.
        entries: shape and dtype of every tensor, by name.
        nbytes: the bytes of all tensors, without headers.

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
        self.nbytes = sum(entry.nbytes for entry in self.entries.values())

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

    def reader(self, name: str) -> Reader:
        """The reader of the file that holds a tensor."""
        return self._readers[name]

    def read(self, name: str) -> Tensor:
        """One tensor; where the format allows it, an alias of the mapped file."""
        return self._readers[name].read(name)

    def read_chunk(self, name: str, start: int, shape: tuple[int, ...]) -> Tensor:
        """Read consecutive elements of a tensor into new memory; read nothing else if the file allows that.

        Args:
            name: the name of the tensor.
            start: the index of the first element, in row-major order.
            shape: the shape of the result; its product is the number of elements to read.
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


def find_files(path: Path, suffixes: Sequence[str]) -> CheckpointFiles:
    """The files of the checkpoint at a path.

    Args:
        path: a file of tensors, an index, or a directory that holds one of either.
        suffixes: the possible ends of the names of tensor files. If a directory has files of several kinds, the kind
            that comes first here is taken.

    Raises:
        FormatError: if a directory holds several checkpoints or none, or the index is invalid or names a file outside
            of its directory.
        CheckpointError: if something cannot be read, or a file that the index names is missing.
    """
    with as_checkpoint_error(f"{path} cannot be read"):
        if ".index." in path.name and path.name.endswith(".json") and path.is_file():
            return _indexed(path, suffixes)
        if not path.is_dir():
            return CheckpointFiles((path,))
        return _in_folder(path, suffixes)


def _in_folder(path: Path, suffixes: Sequence[str]) -> CheckpointFiles:
    names = sorted(entry.name for entry in path.iterdir())
    for suffix in suffixes:
        indexes = [name for name in names if f"{suffix}.index." in name and name.endswith(".json")]
        files = [name for name in names if name.endswith(suffix)]
        files = [name for name in files if name in (f"model{suffix}", f"pytorch_model{suffix}")] or files
        if len(indexes) == 1:
            return _indexed(_inside(path, indexes[0]), suffixes)
        if len(indexes or files) > 1:
            raise FormatError(
                f"{path} has {len(indexes or files)} {'indexes' if indexes else 'files of tensors and no index'}: "
                f"{', '.join(indexes or files)}; give the path of one of them"
            )
        if files and _SHARD.search(files[0]):
            raise FormatError(f"{path} has {files[0]} and no index: the other files are missing; fetch them again")
        if files:
            return CheckpointFiles((_inside(path, files[0]),), path)
    others = [name for name in names if name.lower().endswith(WEIGHT_SUFFIXES)]
    there = (
        f"the path of one of {', '.join(others)}" if others else "the path of the directory, or the file, that has one"
    )
    raise FormatError(f"{path} is a directory without a file whose name ends in {' or '.join(suffixes)}; give {there}")


def _indexed(path: Path, suffixes: Sequence[str]) -> CheckpointFiles:
    if not path.is_file() or path.stat().st_size > MAX_HEADER:
        raise FormatError(f"{path} is not a file of at most {MAX_HEADER:,} bytes; it is no index")
    index = parse_object(path.read_bytes(), path, "index")
    weight_map, metadata = index.get("weight_map"), index.get("metadata", {})
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(metadata, dict):
        raise FormatError(f"{path} is not a valid index: it has no weight_map from tensors to files")
    files = sorted({str(file) for file in weight_map.values()})
    for file in files:
        if file != Path(file).name or "\\" in file or not file.endswith(tuple(suffixes)):
            raise FormatError(
                f"{path} is not a valid index: it names {file!r}, which is not the name of a file of tensors beside it"
            )
    if missing := [file for file in files if not (path.parent / file).exists()]:
        raise CheckpointError(f"{path} names files that are missing: {', '.join(missing)}; fetch them again")
    paths = tuple(_inside(path.parent, file) for file in files)
    return CheckpointFiles(paths, path.parent, path, weight_map, metadata)


def companions(files: CheckpointFiles) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The other files of a checkpoint's directory, by paths in it.

    Returns:
        the files that go with any form of its tensors: configuration, tokenizer and the like, in its subdirectories
        too; and the files to leave behind: other files of tensors, hidden files, and links to other directories.
    """
    if files.folder is None:
        return (), ()
    own = {path.name for path in files.paths} | ({files.index.name} if files.index is not None else set())
    along: list[str] = []
    behind: list[str] = []
    for at, folders, names in os.walk(files.folder, onerror=_raise):
        here = Path(at)
        for name in [*folders]:
            if name.startswith(".") or (here / name).is_symlink():
                folders.remove(name)
                behind.append(f"{(here / name).relative_to(files.folder)}/")
        for name in names:
            if here == files.folder and name in own:
                continue
            (along if _goes_along(here, name) else behind).append(str((here / name).relative_to(files.folder)))
    return tuple(sorted(along)), tuple(sorted(behind))


def file_beside(files: CheckpointFiles, name: str) -> Path | None:
    """Find a file beside those of a checkpoint; None if it does not exist.

    Raises:
        FormatError: if it is a link to somewhere else.
        CheckpointError: if that cannot be told.
    """
    folder = files.folder or files.paths[0].parent
    with as_checkpoint_error(f"{folder / name} cannot be read"):
        return _inside(folder, name) if (folder / name).is_file() else None


def read_json(path: Path) -> dict[str, Any]:
    """Read a configuration in JSON.

    Raises:
        FormatError: if it is too large, or not a JSON object.
        CheckpointError: if it cannot be read.
    """
    with as_checkpoint_error(f"{path} cannot be read"):
        if path.stat().st_size > MAX_HEADER:
            raise FormatError(f"{path} has more than {MAX_HEADER:,} bytes, which is too large for a configuration")
        text = path.read_bytes().strip()
    return parse_object(text, path, "text")


def _raise(error: OSError) -> None:
    with as_checkpoint_error(f"{error.filename} cannot be read"):
        raise error


def _goes_along(folder: Path, name: str) -> bool:
    path = folder / name
    weights = path.suffix.lower() in WEIGHT_SUFFIXES or any(f"{suffix}.index." in name for suffix in WEIGHT_SUFFIXES)
    return not name.startswith(".") and not weights and path.is_file() and _stays_inside(path)


def _inside(folder: Path, name: str) -> Path:
    """A file in a directory.

    Raises:
        FormatError: if it is a link to somewhere else.
    """
    path = folder / name
    if not _stays_inside(path):
        raise FormatError(
            f"{path} is a link to {os.path.realpath(path)}, outside of its directory; copy the file, or give the path "
            "of the file itself"
        )
    return path


def _stays_inside(path: Path) -> bool:
    """Whether a path, with links followed, stays in its own directory.

    In the cache of the Hugging Face hub, links in ``snapshots/<revision>`` and below go to the ``blobs`` beside
    ``snapshots``; these count too.
    """
    # Not `Path.resolve`, which raises an error of its own for links in a circle.
    home, target = Path(os.path.realpath(path.parent)), Path(os.path.realpath(path))
    hub = next((parent.parent for parent in home.parents if parent.name == "snapshots"), None)
    return target.parent == home or (hub is not None and target.parent == hub / "blobs")
