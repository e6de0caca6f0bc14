"""From whatever the user hands in to the `Source` for it."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch import Tensor, nn

from fewbits.checkpoint.state_dicts import entry_of
from fewbits.errors import ArgumentError
from fewbits.sources.base import LiveSource
from fewbits.sources.file import FileSource
from fewbits.sources.mapping import MappingSource
from fewbits.sources.module import ModuleSource


def open_source(source: object, *, inplace: bool = False, entry: str | None = None) -> FileSource | LiveSource:
    """The source for a model, a state dict, or the path of a checkpoint.

    Args:
        source: one of these.
        inplace: whether the result replaces it.
        entry: the name of the state dict in a mapping, or a file of `torch.save`, that holds more than that.

    Raises:
        ArgumentError: if it is none of these, or `inplace` or `entry` does not go with it.
        SourceError: if it cannot be quantized as it is.
        CheckpointError: if the file cannot be read.
    """
    if isinstance(source, nn.Module):
        if entry is not None:
            raise ArgumentError(f"entry={entry!r} goes with a mapping or a file of torch.save, not with a model")
        return ModuleSource(source, inplace=inplace)
    if isinstance(source, Mapping):
        return MappingSource(_state_dict(source, entry), inplace=inplace)
    if isinstance(source, (str, os.PathLike)):
        if inplace:
            raise ArgumentError("a file is never changed in place; pass output= to convert()")
        return FileSource(source, entry)
    raise ArgumentError(
        f"a {type(source).__name__} cannot be quantized; give an nn.Module, a state dict, or the path of a checkpoint "
        "(not what torch.export or another compiler made of one)"
    )


def _state_dict(source: Mapping[str, object], entry: str | None) -> Mapping[str, object]:
    if entry is None:
        return source
    found = entry_of(source, entry, Tensor, "the mapping")
    if not isinstance(found, Mapping):
        raise ArgumentError(f"the entry {entry!r} is a {type(found).__name__}, not a state dict")
    return found
