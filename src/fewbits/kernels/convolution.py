"""How convolutions compute: with codes in bfloat16, or the sums of int8 inputs.

Sums of int8 inputs are an integer product, a float32 convolution, or a float64 convolution. All three are exact, so
they give the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.kernels import features
from fewbits.kernels.base import Compute
from fewbits.kernels.integers import MOST_INPUTS, FloatSums, IntMM, refuses_int_mm, sums_of_products
from fewbits.kernels.packed_mm import FEW_INPUTS, FEW_OUTPUTS
from fewbits.kernels.reference import REFERENCE, is_transformed
from fewbits.kernels.weight_layouts import WeightLayout
from fewbits.numerics.affine import largest_sum
from fewbits.numerics.dtypes import dtype_name
from fewbits.numerics.layout import Layout

#: The name of the way that `refuses_codes` refuses.
CODES = "bf16_convolution"

#: The answers of `way_of_sums`.
PATCHES, FLOATS, DOUBLES = IntMM.name, FloatSums.name, REFERENCE.name


def refuses_codes(module: Any, weight: WeightLayout, x: Tensor, compute: Compute) -> str | None:
    """Say why a convolution does not multiply codes in bfloat16; None if it does.

    Bfloat16 holds codes of 8 bits exactly. As in linear layers, inputs and outputs are rounded. That leaves 50 dB or
    more, unless sums nearly cancel. Layers with few input channels read images, whose mean is far from zero, so that
    their sums do.
    """
    spec, shape = weight.spec, weight.layout.shape
    if compute == "exact":
        return "compute is 'exact'"
    if module.transposed or module.groups != 1:
        return "it is transposed or has groups"
    if weight.layout != Layout.of(shape, inputs=range(1, len(shape))):
        return "the rows of its weight are not its output channels"
    if spec.bits != 8 or spec.levels is not None or not spec.symmetric or spec.granularity == "group":
        return "its codes are not symmetric 8-bit integers with a scale for each row"
    if shape[0] < FEW_OUTPUTS or shape[1] < FEW_INPUTS:
        return f"{shape[0]} channels out of {shape[1]} are too few for 50 dB in bfloat16"
    if not features.has_bf16():
        return "this CPU has no instructions for bfloat16"
    return _refuses_call(x, weight)


def _refuses_call(x: Tensor, weight: WeightLayout) -> str | None:
    if weight.scale.device.type != "cpu":
        return f"the weight is on {weight.scale.device}, not on the CPU"
    if type(x) is not Tensor or x.layout is not torch.strided or x.device.type != "cpu":
        return "the input is not a plain tensor on the CPU"
    if is_transformed(x) or is_transformed(weight.scale):
        return "a transform of torch.func is active"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"inputs in {dtype_name(x.dtype)} are not computed in bfloat16"
    if not x.numel():
        return "the input has no elements"
    if x.requires_grad and torch.is_grad_enabled():
        return "the input needs a gradient"
    return "autocast decides the dtype" if torch.is_autocast_enabled("cpu") else None


def convolved_codes(
    convolve: Callable[[Tensor, Tensor, Tensor | None], Tensor], x: Tensor, weight: WeightLayout, bias: Tensor | None
) -> Tensor:
    """Convolve with codes in bfloat16; then multiply with the scales, in float32.

    Args:
        convolve: Takes input, weight and bias.
        x: The inputs: (batch, channels, spatial...), or without the batch axis.
        weight: A weight that `refuses_codes` accepts.
        bias: (outputs,).

    Returns:
        The outputs, in the dtype of `x`.
    """
    signed = _signed(weight)
    sums = convolve(x.to(torch.bfloat16), signed.to(torch.bfloat16), None).float()
    along = (-1, *[1] * (signed.dim() - 2))
    scale = weight.scale.float().view(along)
    output = sums.mul_(scale) if bias is None else torch.addcmul(bias.float().view(along), sums, scale)
    return output.to(x.dtype)


def _signed(weight: WeightLayout) -> Tensor:
    """Return symmetric codes of 8 bits, in the shape of the weight."""
    return (weight.codes(slice(None)) ^ 0x80).view(torch.int8).view(weight.layout.shape)


def way_of_sums(module: Any, weight: WeightLayout, x: Tensor, compute: Compute) -> tuple[str, Mapping[str, str]]:
    """Choose how a convolution sums the products of its int8 inputs.

    Returns:
        ``"int_mm"`` (an integer product of patches), ``"float_sums"`` (a float32 convolution of codes), or
        ``"reference"`` (a float64 convolution of codes); and the reason against each way before it.
    """
    refused: dict[str, str] = {}
    for name, refuses in ((PATCHES, _refuses_patches), (FLOATS, _refuses_floats)):
        reason = _refuses_any(weight, x, compute) or refuses(module, weight)
        if reason is None:
            return name, refused
        refused[name] = reason
    return DOUBLES, refused


def _refuses_any(weight: WeightLayout, x: Tensor, compute: Compute) -> str | None:
    if compute == "exact":
        return "compute is 'exact'"
    if weight.scale.device.type != "cpu":
        return f"the weight is on {weight.scale.device}, not on the CPU"
    if x.dtype == torch.float64:
        return "inputs in float64 need float64 products"
    return None if x.numel() else "the input has no elements"


def _refuses_patches(module: Any, weight: WeightLayout) -> str | None:
    if module.transposed or module.groups != 1 or module.padding_mode != "zeros":
        return "it is transposed, has groups, or is padded with other numbers than zeros"
    if weight.spec.bits != 8 or not weight.spec.symmetric:
        return "its codes are not symmetric 8-bit codes"
    if weight.layout.columns > MOST_INPUTS:
        return f"sums of {weight.layout.columns} products may not fit int32"
    return refuses_int_mm()


def _refuses_floats(module: Any, weight: WeightLayout) -> str | None:
    products = weight.layout.columns
    if largest_sum(products, weight.spec) > 2**24:  # float32 holds every integer up to here
        return f"float32 does not hold every sum of {products} products exactly"
    return None if features.convolution_is_exact() else features.INEXACT_CONVOLUTION


def sums_of_patches(codes: Tensor, module: Any, weight: WeightLayout) -> Tensor:
    """Sum the products of codes: int32, (batch, outputs, spatial...), or without the batch axis.

    Args:
        codes: The rounded inputs: int8, (batch, channels, spatial...), or without the batch axis.
        module: A convolution of torch; its kernel size, stride, padding and dilation are used.
        weight: The weight, (outputs, channels, kernel...).
    """
    spatial = len(module.kernel_size)
    if codes.dim() == spatial + 1:
        return sums_of_patches(codes.unsqueeze(0), module, weight).squeeze(0)
    # Channels last, so that a patch is a few long runs of bytes.
    padded = F.pad(codes, module._reversed_padding_repeated_twice).movedim(1, -1).contiguous()
    patches = _patches(padded, module.kernel_size, module.stride, module.dilation)
    outputs = patches.shape[: 1 + spatial]
    signed = _signed(weight).movedim(1, -1)
    # torch gives wrong products for a view with overlapping rows, so copy it.
    rows = patches.reshape(math.prod(outputs), -1).contiguous()
    sums = sums_of_products(rows, signed.reshape(len(signed), -1))
    return sums.view(*outputs, -1).movedim(-1, 1)


def _patches(x: Tensor, size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """View (batch, spatial..., channels) as (batch, places..., kernel..., channels)."""
    spans = [d * (k - 1) + 1 for k, d in zip(size, dilation, strict=True)]
    places = [(n - span) // s + 1 for n, span, s in zip(x.shape[1:-1], spans, stride, strict=True)]
    if min(places) < 1:
        raise RuntimeError(f"the kernel spans {spans}, more than the padded input, {tuple(x.shape[1:-1])}")
    first, *along, last = x.stride()
    to_next_place = [a * s for a, s in zip(along, stride, strict=True)]
    within = [a * d for a, d in zip(along, dilation, strict=True)]
    return x.as_strided((x.shape[0], *places, *size, x.shape[-1]), (first, *to_next_place, *within, last))
