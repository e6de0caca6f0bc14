"""Open a model, state dict or checkpoint path as a `Source`."""

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
    """Open a model, a state dict, or the path of a checkpoint as a `Source`.

    Args:
        source: the model, state dict or path.
        inplace: whether the result replaces the source.
        entry: the name of the state dict within a mapping or `torch.save` file that holds more than a state dict.

    Raises:
        ArgumentError: if `source` has another type, or does not support `inplace` or `entry`.
        SourceError: if the source cannot be quantized, for example because it is quantized already.
        CheckpointError: if the file cannot be read.
    """
    if isinstance(source, nn.Module):
        if entry is not None:
            raise ArgumentError(f"entry={entry!r} needs a mapping or a file of torch.save, not a model")
        return ModuleSource(source, inplace=inplace)
    if isinstance(source, Mapping):
        found = source if entry is None else entry_of(source, entry, Tensor, "the mapping")
        if not isinstance(found, Mapping):
            raise ArgumentError(f"the entry {entry!r} is a {type(found).__name__}, not a state dict")
        return MappingSource(found, inplace=inplace)
    if isinstance(source, (str, os.PathLike)):
        if inplace:
            raise ArgumentError("a file is never changed in place; pass output= to convert()")
        return FileSource(source, entry)
    raise ArgumentError(
        f"a {type(source).__name__} cannot be quantized; give an nn.Module, a state dict, or the path of a checkpoint "
        "(not the output of torch.export or another compiler)"
    )
