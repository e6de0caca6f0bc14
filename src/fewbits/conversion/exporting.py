"""`convert`: write a quantized checkpoint in another format, read it back, and publish it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import attrs

from fewbits._events import emit
from fewbits.checkpoint.folder import companions, find_files
from fewbits.checkpoint.publishing import check_folder_name, check_parent, check_place, published
from fewbits.checkpoint.raw import as_checkpoint_error, copy_durably, write_durably
from fewbits.checkpoint.reading import Checkpoint
from fewbits.errors import ArgumentError
from fewbits.formats.base import Described, Exporter, Readable
from fewbits.formats.fewbits_format import FewbitsFormat
from fewbits.formats.model_config import QUANTIZATION_FILES, copy_config, folder_of
from fewbits.formats.registry import EXPORTERS, open_quantized
from fewbits.formats.settings import CONFIG_FILE
from fewbits.observers.named import make_named
from fewbits.selection.progress import Progress, no_progress
from fewbits.sources.file import SUFFIXES

#: How many tensors an error message names.
_NAMED = 3

_REPLACE = ", or replace it (--replace, replace=True)"


@attrs.frozen
class Exported:
    """A checkpoint in another format.

    Attributes:
        path: the file or directory.
        format: the name of the format.
        quantized: how many tensors are stored as codes.
        kept: how many other tensors are stored.
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
    **settings: Any,
) -> Exported:
    """Write a quantized checkpoint in another format, with the codes that it has.

    The result appears at its path only after it was read back and compared with the source.

    Args:
        source: a quantized checkpoint, of fewbits or in a format in `fewbits.formats.registry.FOREIGN`.
        output: the path of the result.
        format: the name of a format, or an `Exporter` with settings of its own.
        replace: whether to replace an existing result.
        progress: called before and after every tensor.
        settings: settings of a named format. All have ``allow=True``: write tensors too that readers of the format may
            not take. Directories have ``max_shard_size=``.

    Raises:
        ArgumentError: if the format is not known, readers of the format cannot take a tensor, or the path is not
            allowed.
        DigestError: if the source is a damaged checkpoint of fewbits.
        CheckpointError: if a file cannot be read or written, or reads back with other values.
    """
    exporter = _exporter(format, settings)
    checkpoint, path = open_quantized(source), Path(output)
    obstacles = check_export(checkpoint, path, exporter, replace=replace)
    if isinstance(checkpoint, Checkpoint):
        checkpoint.check("digests")  # new digests would hide damage
    folder = not exporter.suffix
    with published(path, folder=folder, replace=replace) as work:
        exporter.write(checkpoint, work, progress)
        if folder:
            _copy_companions(checkpoint, work, exporter)
        exporter.check(checkpoint, work, progress)
        nbytes = _size(work)
    if obstacles:
        emit("warning", "obstacles_allowed", file=str(path), format=exporter.name, tensors=obstacles)
    stored = exporter.exported(checkpoint).stored
    quantized = sum(row.fate == "quantized" for row in stored)
    return Exported(path, exporter.name, quantized, len(stored) - quantized, nbytes, obstacles)


def _exporter(format: str | Exporter, settings: dict[str, Any]) -> Exporter:
    if not isinstance(format, Exporter):
        return exporter_named(format, **settings)
    if settings:
        raise ArgumentError(f"{', '.join(settings)}: an Exporter has settings of its own; pass them to it")
    return format


def exporter_named(name: str, **settings: Any) -> Exporter:
    """Make an exporter of a known format.

    Raises:
        ArgumentError: for another name, with all names, or for settings that the format does not have.
    """
    if name not in EXPORTERS:
        raise ArgumentError(f"format must be {', '.join(map(repr, EXPORTERS))} or an Exporter, not {name!r}")
    return make_named("format", {"name": name, **settings}, EXPORTERS)


def check_export(source: Described, path: Path, exporter: Exporter, *, replace: bool) -> dict[str, str]:
    """Refuse an export before anything is written.

    Returns:
        the obstacles that the exporter allows.

    Raises:
        ArgumentError: for obstacles that it does not allow, or a path that is not allowed.
        CheckpointError: if the directory of the result does not exist, or a configuration cannot be read.
    """
    obstacles = exporter.obstacles(source)
    if obstacles and not exporter.allow:
        raise ArgumentError(_refusal(exporter, obstacles))
    with as_checkpoint_error(f"{path} cannot be written"):
        _refuse_source(source, path)
        _check_path(path, exporter, replace=replace)
    return obstacles


def _refusal(exporter: Exporter, obstacles: dict[str, str]) -> str:
    named = "; ".join(f"{name} {reason}" for name, reason in [*obstacles.items()][:_NAMED])
    more = f"; and {len(obstacles) - _NAMED:,} more" if len(obstacles) > _NAMED else ""
    return (
        f"readers of {exporter.name} cannot take this checkpoint: {named}{more}. "
        "Quantize with other settings, or write it anyway (--allow, allow=True)"
    )


def _check_path(path: Path, exporter: Exporter, *, replace: bool) -> None:
    folder = not exporter.suffix
    if folder:
        check_folder_name(path)
    elif path.suffix != exporter.suffix:
        raise ArgumentError(f"{path} must end in {exporter.suffix}, because the result is a file of {exporter.name}")
    check_parent(path)
    check_place(path, folder=folder, replace=replace, advice=_REPLACE)
    if not folder and path.exists() and not replace:
        raise ArgumentError(f"{path} exists; give another path{_REPLACE}")


def _refuse_source(source: Described, path: Path) -> None:
    target, own = Path(os.path.realpath(path)), Path(os.path.realpath(source.path))
    home = folder_of(own) or own
    if target == own or target in own.parents or home in target.parents:
        raise ArgumentError(f"{path} is the source, holds it or lies inside of it; give another path to write to")


def _copy_companions(source: Readable, work: Path, exporter: Exporter) -> None:
    """Copy configuration, tokenizer and the like from the directory of the source."""
    home, entries = folder_of(source.path), exporter.config(source)
    along, behind = ((), ()) if home is None else companions(find_files(Path(source.path), SUFFIXES))
    for name in along:
        if home is None or name in QUANTIZATION_FILES or (work / name).exists():
            continue
        if name == CONFIG_FILE:
            copy_config(home / name, work / name, entries)
        else:
            copy_durably(home / name, work / name)
    if entries and CONFIG_FILE not in along:
        write_durably(work / CONFIG_FILE, (json.dumps(entries, indent=2) + "\n").encode())
    if behind:
        emit("warning", "left_behind", folder=str(home), files=list(behind))


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
