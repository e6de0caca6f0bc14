"""`Contender`: one way to store and run a linear layer, by fewbits or another library."""

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

#: Names of the two contenders that times are compared with.
BASELINE = "dense fp32"
COPY = "copy_"

Layer = Callable[[Tensor], Tensor]


@attrs.frozen
class Contender:
    """One way to store and run a linear layer.

    `build` makes a layer from a float layer that it may change. `start` takes such a layer and returns the call that
    quantizes it. `bits` is the least storage of one weight: it decides how many layers overflow a cache. Where
    `anew` is false, layers are copied, because building one takes long.
    """

    name: str
    package: str
    dtype: torch.dtype = torch.float32
    bits: float = 32
    build: Callable[[nn.Linear], Layer] | None = None
    start: Callable[[nn.Linear], Call] | None = None
    anew: bool = True

    def layers(self, weight: Tensor, count: int) -> list[Layer]:
        first = self._built(weight)
        return [first, *(self._built(weight) if self.anew else copy.deepcopy(first) for _ in range(count - 1))]

    def _built(self, weight: Tensor) -> Layer:
        if self.build is None:
            raise ValueError(f"{self.name} has no layer to run")
        return self.build(linear(weight, self.dtype))


def later(quantize: Callable[[nn.Linear], object]) -> Callable[[nn.Linear], Call]:
    """Make a `Contender.start` from a function that quantizes at once."""
    return lambda layer: partial(quantize, layer)


def linear(weight: Tensor, dtype: torch.dtype) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.to(dtype, copy=True), requires_grad=False)
    return layer.eval()


def copies(elements: int, bits: float, multiple: float, most: int = 512) -> int:
    """Count the layers, at least two, that hold this multiple of the bytes of the last cache."""
    stored = elements * bits / 8
    return min(most, max(2, math.ceil(multiple * last_level_cache() / stored)))


def missing(modules: Iterable[str]) -> list[str]:
    return [name for name in modules if importlib.util.find_spec(name.split(".")[0]) is None]


def short(dtype: torch.dtype) -> str:
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
    return names.get(dtype, str(dtype).removeprefix("torch."))


def dense(dtype: torch.dtype) -> Contender:
    return Contender(f"dense {short(dtype)}", "torch", dtype, torch.finfo(dtype).bits, build=lambda layer: layer)


def copy_contender() -> Contender:
    """Copy the weight into memory that was touched before."""

    def start(layer: nn.Linear) -> Call:
        source = layer.weight.detach()
        target = torch.zeros_like(source)
        return lambda: target.copy_(source)

    return Contender(COPY, "torch", start=start)
