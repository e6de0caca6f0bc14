"""bitsandbytes: nf4 and int8 weights."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.contender import Contender, Layer, later, short

PACKAGE = "bitsandbytes"
MODULES = ("bitsandbytes",)


def contenders(dtype: torch.dtype, group_size: int) -> list[Contender]:
    kinds = {"nf4": (_nf4, 4), "int8": (_int8, 8)}
    return [
        Contender(
            f"bitsandbytes {kind}, {short(dtype)}",
            PACKAGE,
            dtype,
            bits,
            build=quantized,
            start=later(quantized),
        )
        for kind, (quantized, bits) in kinds.items()
    ]


def _nf4(layer: nn.Linear) -> Layer:
    from bitsandbytes.nn import Linear4bit, Params4bit

    sizes = layer.in_features, layer.out_features
    module = Linear4bit(*sizes, bias=False, compute_dtype=layer.weight.dtype, quant_type="nf4", device="meta")
    module.weight = Params4bit(layer.weight.detach(), requires_grad=False, quant_type="nf4", module=module)
    return module.to("cpu").eval()  # this call quantizes


def _int8(layer: nn.Linear) -> Layer:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    module = Linear8bitLt(layer.in_features, layer.out_features, bias=False, has_fp16_weights=False, device="meta")
    module.weight = Int8Params(layer.weight.detach(), requires_grad=False, has_fp16_weights=False)
    return module.to("cpu").eval()  # this call quantizes
