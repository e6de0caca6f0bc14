"""hqq: 4 bits in groups of 64."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.contender import Contender, Layer, later, short

PACKAGE = "hqq"
MODULES = ("hqq",)


def contenders(dtype: torch.dtype, group_size: int) -> list[Contender]:
    return [
        Contender(
            f"hqq 4 bit g64, {short(dtype)}",
            PACKAGE,
            dtype,
            4,
            build=_quantized,
            start=later(_quantized),
            anew=False,
        )
    ]


def _quantized(layer: nn.Linear) -> Layer:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=64)
    return HQQLinear(layer, config, compute_dtype=layer.weight.dtype, device="cpu", del_orig=False)
