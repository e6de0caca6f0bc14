"""Weights with any codes, quantized layers, and their expected outputs."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

import fewbits
from fewbits import QuantSpec
from fewbits.extend import Layout, QuantParams
from fewbits.kernels import choose
from fewbits.kernels.base import Kernel
from fewbits.kernels.weight_layouts import PackedInt32
from fewbits.numerics.dtypes import POWERS_OF_TWO
from fewbits.numerics.levels import E4M3
from fewbits.numerics.levels import NF4 as NF4_LEVELS
from fewbits.numerics.metrics import sqnr_db
from fewbits.numerics.tensor import QuantizedTensor
from fewbits.testing.kernel_outputs import any_codes, generator, with_inputs

INT8 = QuantSpec(bits=8, granularity="channel")
INT4 = QuantSpec(bits=4, granularity="group", group_size=64)
FLOAT8 = QuantSpec(bits=8, granularity="channel", levels=E4M3)
NF4 = QuantSpec(bits=4, granularity="group", group_size=64, levels=NF4_LEVELS)


def curved(bits: int) -> tuple[float, ...]:
    """Levels for so many bits, closer together near zero."""
    half = 2 ** (bits - 1)
    return tuple(math.copysign((abs(code) / half) ** 1.5, code) for code in range(-half, half))


BY_NAME: dict[str, Kernel[Any]] = {kernel.name: kernel for kernel in choose.KERNELS}


def any_words(
    spec: QuantSpec, rows: int, columns: int, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> PackedInt32:
    """Any codes, scales of both signs and any zero points, in the canonical layout."""
    draws, shape = generator(seed), spec.scale_shape(rows, columns)
    scale = torch.rand(shape, generator=draws).add_(0.1)
    if spec.scale_dtype is None or spec.scale_dtype != POWERS_OF_TWO:  # they have no sign
        scale *= 1 - 2 * torch.randint(2, shape, generator=draws)
    return with_codes(
        any_codes((rows, columns), spec, draws),
        spec,
        scale=scale.to(spec.scale_dtype or dtype),
        zero_point=None if spec.symmetric else any_codes(shape, spec, draws),
    )


def with_codes(codes: Tensor, spec: QuantSpec, scale: Tensor, zero_point: Tensor | None = None) -> PackedInt32:
    dtype = torch.float32 if scale.dtype == POWERS_OF_TWO else scale.dtype
    value = QuantizedTensor.from_codes(
        codes, QuantParams(scale, zero_point), spec=spec.weight_only(), layout=Layout.of(codes.shape), dtype=dtype
    )
    return PackedInt32.of_value(with_inputs(value, spec))


def linear(outputs: int, inputs: int, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(outputs * 10_000 + inputs)
    return nn.Linear(inputs, outputs, bias=bias).to(dtype)


class Of(fewbits.Quantizer):
    """One spec for every tensor, however small."""

    def __init__(self, spec: QuantSpec) -> None:
        self.spec = spec
        super().__init__(selector=fewbits.LayerSelector(min_elements=1))


def quantized(module: nn.Module, spec: QuantSpec, compute: Any = "auto", data: Any = None) -> Any:
    """A quantized copy of a module."""
    if data is None and spec.activations == "static":
        data = [torch.randn(64, module.in_features, generator=generator(8))]
    return fewbits.quantize(module, Of(spec), validate=False, compute=compute, data=data).model


def exactly(module: Any) -> Any:
    """A copy that computes as the reference does."""
    module = copy.deepcopy(module)
    fewbits.set_compute(module, "exact")
    return module


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=generator(seed)).to(dtype)


def noise_db(found: Tensor, expected: Tensor) -> float:
    """SQNR in dB."""
    expected = expected.double()
    return sqnr_db(float(expected.square().sum()), float((found.double() - expected).square().sum()))
