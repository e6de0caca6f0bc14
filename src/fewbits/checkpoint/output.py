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
    """Where to write a quantized checkpoint, and how.

    Attributes:
        path: the path of the result: a directory if the source is a directory or an index, or if `max_shard_size` is
            given; otherwise a file.
        max_shard_size: the most bytes of tensors in one file of a directory, as a number or a text such as ``"5GB"``. A
            larger tensor has a file of its own. None: 5 GB in a directory, and no limit in a single file.
        replace: whether to replace a directory that has files, and to discard an unfinished run and start over. A link
            to a directory stays, and the directory behind the link is replaced. A result that is one file replaces an
            existing file in any case; only a resumed run refuses a file that was created after the run began.
        resume: whether to continue an unfinished run. Without one, a finished result is checked and accepted, or else
            a new run begins. Resuming is refused if the source (size, time of change and header of each file), a
            setting, or the version of fewbits or torch has changed. A finished result is compared with the source: the
            fate of every tensor, the names of the files, and every element within its error bound. A finished result of
            another observer passes this comparison, because files do not record the observer.
        distributed: whether every process of the default group of `torch.distributed` calls `quantize` with this
            output. Each process writes some of the files of a directory, and rank 0 publishes the result.
        max_memory: the memory to plan for, in addition to that after importing fewbits, as a number of bytes or a text
            such as ``"512MB"``. Chunks become smaller and threads fewer to stay within it; a run that cannot stay
            within it is refused before anything is written. None sets no limit.
        threads: the number of tensors, or pieces of large ones, that are converted at a time; None means as many as
            torch has threads. `max_memory` can lower it. The result does not depend on it.

    Raises:
        ArgumentError: if a field has an invalid value.
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
