"""torchao: int8 weights, int4 weights in groups, and int8 weights with int8 activations."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.contender import Contender, Layer, short
from benchmarks.timing import Call

PACKAGE = "torchao"
MODULES = ("torchao",)


def contenders(dtype: torch.dtype, group_size: int) -> list[Contender]:
    kinds = {"int8": 8, f"intx int4 g{group_size}": 8, "int8 dynamic": 8}  # int4 takes a byte a weight there
    return [
        Contender(
            f"torchao {kind}, {short(dtype)}",
            PACKAGE,
            dtype,
            bits,
            build=partial(_build, kind, group_size),
            start=partial(_start, kind, group_size),
        )
        for kind, bits in kinds.items()
    ]


def _config(kind: str, group_size: int) -> Any:
    from torchao import quantization as ao
    from torchao.quantization.granularity import PerGroup

    if kind == "int8":
        return ao.Int8WeightOnlyConfig()
    if kind == "int8 dynamic":
        return ao.Int8DynamicActivationInt8WeightConfig()
    return ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(group_size))


def _start(kind: str, group_size: int, layer: nn.Linear) -> Call:
    from torchao.quantization import quantize_

    config = _config(kind, group_size)
    config.set_inductor_config = False  # it would change settings of the whole process
    return partial(quantize_, layer, config)


def _build(kind: str, group_size: int, layer: nn.Linear) -> Layer:
    _start(kind, group_size, layer)()
    return layer
