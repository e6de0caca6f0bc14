"""`Output`: where and how a quantized checkpoint is written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import attrs

from fewbits._sizes import parse_size
from fewbits.errors import ArgumentError

#: Default limit on the bytes of tensors in one file of a directory; the default of transformers.
MAX_SHARD_SIZE = 5 * 10**9


def _path(path: object) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise ArgumentError(f"output must be a path, or an Output, not {path!r}")
    return Path(path)


def _is_bool(_: object, attribute: attrs.Attribute[bool], value: object) -> None:
    if type(value) is not bool:
        raise ArgumentError(f"{attribute.name} must be True or False, not {value!r}")


def _shard_size(size: int | str | None) -> int | None:
    return None if size is None else parse_size(size, "max_shard_size")


def _max_memory(size: int | str | None) -> int | None:
    return None if size is None else parse_size(size, "max_memory")


def _is_count(_: object, __: attrs.Attribute[int | None], value: object) -> None:
    if value is not None and (type(value) is not int or value < 1):
        raise ArgumentError(f"threads must be a number from 1 up, not {value!r}")


@attrs.frozen
class Output:
    """Where the result of a checkpoint on disk is written, and how.

    Attributes:
        path: of the file, or of the directory, if the source is one or `max_shard_size` is given.
        max_shard_size: the most bytes of tensors in one file of a directory, as a number or a text such as ``"5GB"``,
            which is the default; a larger tensor has a file of its own.
        replace: whether a directory that is there already, with files in it, is replaced, and an unfinished run
            starts again. If `path` links to a directory, the directory is replaced and the link stays. An existing file
            is always replaced, unless the file appeared after the start of a run that is now resumed.
        resume: whether to continue an unfinished run, if there is one. fewbits refuses if anything that determines the
            result has changed since. An existing result is compared with its source: the fate of every tensor, and all
            elements within their bounds. The observer cannot be compared, since a file does not record it.
        paranoid: whether to read again the parts of the source that an earlier run has read, and check that they are
            unchanged. Otherwise only each file's size, modification time and header are compared.
        distributed: whether every process of `torch.distributed`'s default group makes this call alike, each writes
            some of the files of a directory, and the first publishes them.
        max_memory: the most resident memory that the process may take beyond what it has when fewbits is imported, as a
            number of bytes or a text such as ``"512MB"``. Chunks become smaller and threads fewer to stay within it;
            what cannot be done within it is refused before anything is written. None sets no limit.
        threads: how many tensors, or pieces of large ones, are worked on at a time; None stands for as many as torch
            has threads. They change nothing in the result.

    Raises:
        ArgumentError: for an invalid path, flag or size, or for fewer than one thread.
    """

    path: Path = attrs.field(converter=_path)
    max_shard_size: int | None = attrs.field(default=None, converter=_shard_size, kw_only=True)
    replace: bool = attrs.field(default=False, validator=_is_bool, kw_only=True)
    max_memory: int | None = attrs.field(default=None, converter=_max_memory, kw_only=True)
    threads: int | None = attrs.field(default=None, validator=_is_count, kw_only=True)
    resume: bool = attrs.field(default=False, validator=_is_bool, kw_only=True)
    paranoid: bool = attrs.field(default=False, validator=_is_bool, kw_only=True)
    distributed: bool = attrs.field(default=False, validator=_is_bool, kw_only=True)

    @classmethod
    def beside(cls, source: str | os.PathLike[str], **how: Any) -> Output:
        """Return the default output, a path next to the source."""
        path = Path(os.path.abspath(source))
        if ".index." in path.name:
            path = path.parent  # the index of a directory stands for all of it
        several = path.is_dir() or how.get("max_shard_size") is not None
        return cls(path.with_name(f"{path.stem}-quantized{'' if several else '.safetensors'}"), **how)

    @classmethod
    def of(cls, output: str | os.PathLike[str] | Output) -> Output:
        """Return `output` itself, or an `Output` for a path."""
        return output if isinstance(output, Output) else cls(output)
