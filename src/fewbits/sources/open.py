"""From whatever the user hands in to the `Source` for it."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch import nn

from fewbits.errors import ArgumentError
from fewbits.sources.base import Source
from fewbits.sources.file import FileSource
from fewbits.sources.mapping import MappingSource
from fewbits.sources.module import ModuleSource


def open_source(source: object, *, inplace: bool = False) -> Source:
    """The source for a model, a state dict, or the path of a checkpoint.

    Raises:
        ArgumentError: if it is none of these, or `inplace` does not go with it.
        SourceError: if it cannot be quantized as it is.
        CheckpointError: if the file cannot be read.
    """
    if isinstance(source, nn.Module):
        return ModuleSource(source, inplace=inplace)
    if isinstance(source, Mapping):
        return MappingSource(source, inplace=inplace)
    if isinstance(source, (str, os.PathLike)):
        if inplace:
            raise ArgumentError("a file is never changed in place; pass output= to convert()")
        return FileSource(source)
    raise ArgumentError(
        f"a {type(source).__name__} cannot be quantized; give an nn.Module, a state dict, or the path of a checkpoint "
        "(not what torch.export or another compiler made of one)"
    )
