"""Find the tensors in the outputs of models, and the positions that count."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor


def named(output: Any, name: str) -> Tensor | None:
    """Return the tensor that an output has under a key or as an attribute; None if it has none."""
    found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    return found if isinstance(found, Tensor) else None


def floating(output: Any) -> Iterator[Tensor]:
    """Yield the floating tensors with elements in tensors, mappings, tuples and lists."""
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.numel():
            yield output
    elif isinstance(output, (Mapping, tuple, list)):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from floating(part)


def counted(batch: Any, output: Tensor) -> Tensor | EllipsisType:
    """Return an index of the positions that count: those in the attention mask of the batch.

    All count if the batch has no mask, or if the first axes of the output are not those of the mask. The index of all
    positions takes no copy of the output.
    """
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if isinstance(mask, Tensor) and output.dim() > mask.dim() and output.shape[: mask.dim()] == mask.shape:
        counts = mask.to(output.device, torch.bool)
        return ... if bool(counts.all()) else counts
    return ...
