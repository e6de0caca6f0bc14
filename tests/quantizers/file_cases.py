"""Checkpoints on disk that are quantized to disk, by every kind of scheme."""

from functools import partial

import torch

import fewbits
from fewbits.extend import QuantParams
from support.checkpoints import AnyScheme
from support.lifecycle_helpers import small

INDEX = "model.safetensors.index.json"


class WithOneScale(fewbits.Int8PerChannel):
    """A scheme whose codes for a row depend on the other rows of the weight."""

    name = "one scale"

    def quantize_tensor(self, weight, spec, observer):
        scale = torch.full((weight.layout.rows, 1), float(weight.whole().abs().max() / 127), dtype=spec.scale_dtype)
        codes = (weight.whole() / scale).round().clamp(-128, 127).to(torch.int8)
        return fewbits.QuantizedTensor.from_codes(
            codes, QuantParams(scale), spec=spec, layout=weight.layout, dtype=weight.dtype
        )


SCHEMES = {
    "int8": small,
    "int8-tensor": partial(small, fewbits.Int8PerTensor),
    "int8-tensor-mse": partial(small, fewbits.Int8PerTensor, observer=fewbits.MSEObserver()),
    "int4": partial(small, fewbits.Int4Grouped, group_size=8),
    "int4-mse": partial(small, fewbits.Int4Grouped, group_size=8, observer=fewbits.MSEObserver()),
    "int4-asymmetric": partial(small, fewbits.Int4Grouped, group_size=7, symmetric=False),
    "int4-two-levels": partial(small, fewbits.Int4Grouped, group_size=8, scale_bits=5),
    "int3-tensor": lambda: AnyScheme(fewbits.QuantSpec(3, "tensor", symmetric=False)),
    "int8-scales": partial(small, scale_dtype=torch.float32),
    "fp16": partial(small, fewbits.FP16Cast),
    "custom": partial(small, WithOneScale),
    "stack": partial(small, fewbits.Int4Grouped, group_size=8, input_axes={"experts.weight": 1}),
}


def checkpoint():
    """Tensors of many shapes. Some have a hundred chunks if chunks are small."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "a.weight": normal(330, 24),
        "b.weight": normal(3, 700, dtype=torch.bfloat16),
        "conv.weight": normal(40, 6, 3, 3),
        "experts.weight": normal(5, 64, 40),
        "wide.weight": normal(1, 900).double(),
        "half.weight": normal(70, 31, dtype=torch.float16),
        "norm.weight": normal(999),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3.0),
        "ids": torch.arange(3000).reshape(3, 1000),
    }
