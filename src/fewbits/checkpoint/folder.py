"""The files of a checkpoint: one file, or a directory with an index of several.

What an index says is not believed either: it names files in its own directory, and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from fewbits.checkpoint.header import MAX_HEADER, parse_object
from fewbits.checkpoint.raw import as_checkpoint_error
from fewbits.errors import CheckpointError, FormatError


@attrs.frozen
class CheckpointFiles:
    """Where the tensors of a checkpoint are.

    Attributes:
        paths: the files, in the order of their names.
        folder: the directory, if a whole one was asked for; None for a single file.
        weight_map: the file's name for every tensor, as the index has it; None without an index.
        metadata: what else the index says.
    """

    paths: tuple[Path, ...]
    folder: Path | None = None
    weight_map: Mapping[str, str] | None = None
    metadata: Mapping[str, Any] = attrs.field(factory=dict)


def find_files(path: Path, suffixes: Sequence[str]) -> CheckpointFiles:
    """The files of the checkpoint at a path.

    Args:
        path: a file of tensors, an index, or a directory that holds one of either.
        suffixes: how the names of files of tensors may end; of a directory that has several kinds the first is taken.

    Raises:
        FormatError: if it is a directory of which that cannot be told, or the index is not one, or names what is
            outside of its directory.
        CheckpointError: if something cannot be read, or a file that the index names is missing.
    """
    with as_checkpoint_error(f"{path} cannot be read"):
        if path.name.endswith(".json") and path.is_file():
            return _indexed(path, suffixes)
        if not path.is_dir():
            return CheckpointFiles((path,))
        names = sorted(entry.name for entry in path.iterdir())
    for suffix in suffixes:
        indexes = [name for name in names if f"{suffix}.index." in name and name.endswith(".json")]
        files = [name for name in names if name.endswith(suffix)]
        files = [name for name in files if name in (f"model{suffix}", f"pytorch_model{suffix}")] or files
        if len(indexes) == 1:
            return _indexed(path / indexes[0], suffixes)
        if len(indexes or files) > 1:
            raise FormatError(
                f"{path} has {len(indexes or files)} {'indexes' if indexes else 'files of tensors and no index'}: "
                f"{', '.join(indexes or files)}; give the path of one of them"
            )
        if files:
            return CheckpointFiles((_inside(path, files[0]),), path)
    raise FormatError(f"{path} is a directory without a file whose name ends in {' or '.join(suffixes)}")


def _indexed(path: Path, suffixes: Sequence[str]) -> CheckpointFiles:
    if path.stat().st_size > MAX_HEADER:
        raise FormatError(f"{path} has more than {MAX_HEADER:,} bytes; it is no index")
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
    return CheckpointFiles(tuple(_inside(path.parent, file) for file in files), path.parent, weight_map, metadata)


def _inside(folder: Path, name: str) -> Path:
    """A file in a directory.

    Links may point to files beside them, and, as in the cache of the Hugging Face hub, from ``snapshots/<revision>`` to
    the ``blobs`` beside ``snapshots``.

    Raises:
        FormatError: if it is a link to anywhere else.
    """
    path, home = folder / name, folder.resolve()
    target = path.resolve()
    allowed = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if target.parent not in allowed:
        raise FormatError(
            f"{path} is a link to {target}, outside of its directory; copy the file, or give its own path"
        )
    return path
