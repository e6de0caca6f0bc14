"""`convert`: write a quantized checkpoint in another format, read it back, and publish it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs

from fewbits._events import emit
from fewbits.checkpoint.folder import companions, find_files
from fewbits.checkpoint.publishing import beside, check_place, move_into_place, remove_tree
from fewbits.checkpoint.raw import as_checkpoint_error, copy_durably, sync_directory
from fewbits.errors import ArgumentError
from fewbits.formats.base import Exporter, Readable
from fewbits.formats.compressed_config import CONFIG_FILE
from fewbits.formats.fewbits_format import FewbitsFormat
from fewbits.formats.registry import EXPORTERS, open_quantized
from fewbits.selection.progress import Progress, no_progress
from fewbits.sources.file import SUFFIXES
from fewbits.sources.model_config import QUANTIZATION_FILES, copy_config, read_vocabularies

#: How many tensors an error message names.
_NAMED = 3


@attrs.frozen
class Exported:
    """A checkpoint in another format.

    Attributes:
        path: the file or directory.
        format: the name of the format.
        quantized: how many tensors are stored as codes.
        kept: how many tensors are stored as they were.
        nbytes: the bytes of all files.
        remarks: the obstacles that were allowed, by tensor.
    """

    path: Path
    format: str
    quantized: int
    kept: int
    nbytes: int
    remarks: dict[str, str]


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    format: str | Exporter = FewbitsFormat.name,
    *,
    replace: bool = False,
    progress: Progress = no_progress,
) -> Exported:
    """Write a quantized checkpoint in another format, with the codes that it has.

    The result appears at its path only after it was read back and compared with the source.

    Args:
        source: a quantized checkpoint, of fewbits or in a format in `fewbits.formats.registry.FOREIGN`.
        output: the path of the result.
        format: the name of a format, or an `Exporter` with settings of its own.
        replace: whether to replace an existing result.
        progress: called before and after every tensor.

    Raises:
        ArgumentError: if the format is not known, readers of the format cannot take a tensor, or the path is not
            allowed.
        CheckpointError: if a file cannot be read or written, or reads back with other values.
    """
    exporter = format if isinstance(format, Exporter) else exporter_named(format)
    return export(open_quantized(source), Path(output), exporter, replace=replace, progress=progress)


def exporter_named(name: str, **settings: Any) -> Exporter:
    """Make an exporter of a known format.

    Raises:
        ArgumentError: for another name, with all names, or for settings that the format does not have.
    """
    if name not in EXPORTERS:
        raise ArgumentError(f"format must be {', '.join(map(repr, EXPORTERS))} or an Exporter, not {name!r}")
    try:
        return EXPORTERS[name](**settings)
    except TypeError as error:
        raise ArgumentError(f"the format {name} does not take {', '.join(settings)}: {error}") from None


def export(source: Readable, path: Path, exporter: Exporter, *, replace: bool, progress: Progress) -> Exported:
    """Write an open checkpoint; see `convert`."""
    obstacles = exporter.obstacles(source)
    if obstacles and not exporter.allow:
        raise ArgumentError(_refusal(exporter, obstacles))
    folder = not exporter.suffix
    _refuse_source(source, path)
    target = check_place(path, folder=folder, replace=replace, advice=", or replace it (--replace, replace=True)")
    if not folder and target.exists() and not replace:
        raise ArgumentError(f"{path} exists; replace it (--replace, replace=True), or give another path")
    with _published(target, folder=folder, replace=replace) as work:
        exporter.write(source, work, progress)
        exporter.check(source, work, progress)
        if folder:
            _copy_companions(source, work, exporter)
    if obstacles:
        emit("warning", "obstacles_allowed", file=str(path), format=exporter.name, tensors=obstacles)
    stored = source.ledger.stored
    quantized = sum(row.fate == "quantized" for row in stored)
    return Exported(path, exporter.name, quantized, len(stored) - quantized, _size(target), obstacles)


def _refusal(exporter: Exporter, obstacles: dict[str, str]) -> str:
    named = "; ".join(f"{name} {reason}" for name, reason in [*obstacles.items()][:_NAMED])
    more = f"; and {len(obstacles) - _NAMED:,} more tensors" if len(obstacles) > _NAMED else ""
    return f"{exporter.name} cannot hold this checkpoint so that its readers take it: {named}{more}"


def _refuse_source(source: Readable, path: Path) -> None:
    target, own = Path(os.path.realpath(path)), Path(os.path.realpath(source.path))
    if target == own or target in own.parents or own in target.parents:
        raise ArgumentError(f"{path} is the source, holds it or lies inside of it; give another path to write to")


@contextmanager
def _published(target: Path, *, folder: bool, replace: bool) -> Iterator[Path]:
    """Yield a temporary path beside the target, which takes the target's name at the end."""
    work = beside(target)
    try:
        with as_checkpoint_error(f"{target} cannot be written"):
            if folder:
                work.mkdir()
            yield work
            if folder:
                move_into_place(work, target, replace=replace)
            else:
                os.replace(work, target)
                sync_directory(target.parent)
    finally:
        if work.is_dir():
            remove_tree(work, "an unfinished result cannot be removed")
        else:
            work.unlink(missing_ok=True)


def _copy_companions(source: Readable, work: Path, exporter: Exporter) -> None:
    """Copy configuration, tokenizer and the like from the directory of the source."""
    home = Path(source.path)
    if not home.is_dir():
        return
    along, behind = companions(find_files(home, SUFFIXES))
    for name in along:
        if name in QUANTIZATION_FILES or (work / name).exists():
            continue
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        if name == CONFIG_FILE:
            vocabularies = read_vocabularies(home / name)
            settings = {} if vocabularies is None else exporter.settings(source, vocabularies)
            copy_config(home / name, work / name, settings)
        else:
            copy_durably(home / name, work / name)
    if behind:
        emit("warning", "left_behind", folder=str(home), files=list(behind))


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
