"""optimum-quanto: qint8 and qint4 weights."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from benchmarks.contender import Contender, Layer, later, short

PACKAGE = "optimum-quanto"
MODULES = ("optimum",)


def contenders(dtype: torch.dtype, group_size: int) -> list[Contender]:
    return [
        Contender(
            f"quanto qint{bits}, {short(dtype)}",
            PACKAGE,
            dtype,
            bits,
            build=partial(_quantized, bits),
            start=later(partial(_quantized, bits)),
        )
        for bits in (8, 4)
    ]


def _quantized(bits: int, layer: nn.Linear) -> Layer:
    from optimum import quanto

    model = nn.Sequential(layer)
    quanto.quantize(model, weights={8: quanto.qint8, 4: quanto.qint4}[bits])
    quanto.freeze(model)
    return model[0]
