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
        path: the path of the file, or of a directory if the source is one or `max_shard_size` is given.
        max_shard_size: the most bytes of tensors in one file of a directory, as a number or a text such as ``"5GB"``,
            which is the default. A larger tensor has a file of its own.
        replace: whether to replace a directory that has files, and to start an unfinished run again. If the path is a
            link to a directory, the directory is replaced and the link stays. A file is always replaced, unless it was
            created after the resumed run began.
        resume: whether to resume an unfinished run, if there is one. Resuming is refused if an input of the result has
            changed; for each file of the source, its size, time of change and header are compared. A finished result
            is compared with its source: the fates, and all elements within their bounds. A file does not say which
            observer chose its scales.
        distributed: whether every process of the default group of `torch.distributed` makes this call. Each process
            writes some of the files of a directory, and the first one publishes them.
        max_memory: the most resident memory that the process may take in addition to that after importing fewbits, as a
            number of bytes or a text such as ``"512MB"``. Chunks become smaller and threads fewer to stay within it;
            a run that cannot stay within it is refused before anything is written. None sets no limit.
        threads: the number of tensors, or pieces of large ones, that are converted at a time; None means as many as
            torch has threads. The result does not depend on it.

    Raises:
        ArgumentError: for an invalid size, or less than one thread.
    """

    path: Path = attrs.field(converter=_path)
    max_shard_size: int | None = attrs.field(default=None, converter=_shard_size, kw_only=True)
    replace: bool = attrs.field(default=False, validator=_is_bool, kw_only=True)
    max_memory: int | None = attrs.field(default=None, converter=_max_memory, kw_only=True)
    threads: int | None = attrs.field(default=None, validator=_is_count, kw_only=True)
    resume: bool = attrs.field(default=False, validator=_is_bool, kw_only=True)
    distributed: bool = attrs.field(default=False, validator=_is_bool, kw_only=True)

    @classmethod
    def beside(cls, source: str | os.PathLike[str], **how: Any) -> Output:
        """Suggest a path for a result: beside its source."""
        path = Path(os.path.abspath(source))
        if ".index." in path.name:
            path = path.parent  # an index means its whole directory
        several = path.is_dir() or how.get("max_shard_size") is not None
        return cls(path.with_name(f"{path.stem}-quantized{'' if several else '.safetensors'}"), **how)

    @classmethod
    def of(cls, output: str | os.PathLike[str] | Output) -> Output:
        """Return `output` itself, or an `Output` for a path."""
        return output if isinstance(output, Output) else cls(output)
