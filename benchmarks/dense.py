"""The float layer: what everything is compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.contender import Contender, short
from benchmarks.timing import Call

BASELINE = "dense fp32"


def contenders() -> list[Contender]:
    """`nn.Linear` in the three dtypes, each with inputs of its own."""
    return [dense(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]


def dense(dtype: torch.dtype) -> Contender:
    """`nn.Linear` in this dtype."""
    return Contender(f"dense {short(dtype)}", "torch", dtype, torch.finfo(dtype).bits, build=lambda layer: layer)


COPY = "copy_"


def copy_contender() -> Contender:
    """Reading and writing as many bytes: ``dst.copy_(src)`` into memory that has been touched."""
    return Contender(COPY, "torch", start=_start_copy)


def _start_copy(layer: nn.Linear) -> Call:
    source = layer.weight.detach()
    return _copier(torch.zeros_like(source), source)


def _copier(target: Tensor, source: Tensor) -> Callable[[], Tensor]:
    return lambda: target.copy_(source)
