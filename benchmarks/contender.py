"""`Contender`: one way of storing and running a linear layer, ours or another's."""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Callable, Iterable
from functools import partial

import attrs
import torch
from torch import Tensor, nn

from benchmarks.machine import last_level_cache
from benchmarks.timing import Call

Layer = Callable[[Tensor], Tensor]


@attrs.frozen
class Contender:
    """One way of storing and running a linear layer.

    Attributes:
        name: what tables call it.
        package: the distribution it comes from.
        dtype: of its inputs and outputs.
        bits: stored for one weight, at least; it tells how many layers do not fit a cache.
        build: makes the layer from a float one, which is the contender's to change; None if it only quantizes.
        start: takes a float layer, of its own likewise, and returns the call that quantizes it, which is what
            `benchmarks.quantize` times; None if there is nothing to quantize.
        anew: whether further layers are built, not copied. Copies are for what takes long to build.
    """

    name: str
    package: str
    dtype: torch.dtype = torch.float32
    bits: float = 32
    build: Callable[[nn.Linear], Layer] | None = None
    start: Callable[[nn.Linear], Call] | None = None
    anew: bool = True

    def layers(self, weight: Tensor, count: int) -> list[Layer]:
        """As many layers, each with memory of its own, all from the same weight."""
        first = self._built(weight)
        return [first, *(self._built(weight) if self.anew else copy.deepcopy(first) for _ in range(count - 1))]

    def _built(self, weight: Tensor) -> Layer:
        if self.build is None:
            raise ValueError(f"{self.name} has no layer to run")
        return self.build(linear(weight, self.dtype))


def later(quantize: Callable[[nn.Linear], object]) -> Callable[[nn.Linear], Call]:
    """A `Contender.start` for what has nothing to settle before it quantizes."""
    return lambda layer: partial(quantize, layer)


def linear(weight: Tensor, dtype: torch.dtype) -> nn.Linear:
    """A float layer without bias, with a copy of this weight."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.to(dtype, copy=True), requires_grad=False)
    return layer.eval()


def copies(elements: int, bits: float, multiple: float, most: int = 512) -> int:
    """How many layers hold this multiple of the last cache's bytes; never fewer than two."""
    stored = elements * bits / 8
    return min(most, max(2, math.ceil(multiple * last_level_cache() / stored)))


def missing(modules: Iterable[str]) -> list[str]:
    """Those of these modules that are not installed."""
    return [name for name in modules if importlib.util.find_spec(name.split(".")[0]) is None]


def short(dtype: torch.dtype) -> str:
    """``fp32`` and the like."""
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
    return names.get(dtype, str(dtype).removeprefix("torch."))
