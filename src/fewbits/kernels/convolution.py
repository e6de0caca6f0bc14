"""How convolutions compute: as linear layers, in bfloat16, or the sums of int8 inputs.

A convolution of kernel size 1 is a linear layer over the channels of each place. With few places, the kernels of
linear layers compute it. Sums of int8 inputs are an integer product, a float32 convolution, or a float64 convolution.
All three are exact, so they give the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.kernels import features
from fewbits.kernels.base import Compute, PreparedWeight
from fewbits.kernels.integers import MOST_INPUTS, FloatSums, IntMM, refuses_int_mm, sums_of_products
from fewbits.kernels.packed_mm import FEW_INPUTS, FEW_OUTPUTS
from fewbits.kernels.reference import REFERENCE, is_transformed
from fewbits.kernels.run import linear
from fewbits.kernels.weight_layouts import WeightLayout, has_byte_rows
from fewbits.numerics.affine import largest_sum
from fewbits.numerics.dtypes import dtype_name
from fewbits.numerics.layout import Layout

#: What `explain` calls a convolution in bfloat16.
BF16 = "bf16_convolution"

#: What `explain` calls the kernels of linear layers where none of them computes a convolution.
LINEAR = "kernels of linear layers"

#: The most places that the kernels of linear layers compute, which copy inputs and outputs into another order. With
#: one place they took a quarter of the time of a convolution; from 49 places on, most convolutions were faster.
MOST_PLACES = 16

#: With fewer products for an output, converting inputs and outputs to bfloat16 takes longer than it saves.
LEAST_PRODUCTS = 256

#: With fewer places, converting a decoded weight to bfloat16 takes longer than it saves.
LEAST_PLACES = 256

#: The order of memory with channels last, by the number of spatial axes.
_CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}

#: The answers of `way_of_sums`.
PATCHES, FLOATS, DOUBLES = IntMM.name, FloatSums.name, REFERENCE.name


def is_pointwise(module: Any) -> bool:
    """Whether a convolution is a linear layer over the channels of each place, or of some places."""
    if module.transposed or module.groups != 1 or set(module.kernel_size) != {1}:
        return False
    stride, padding = module.stride, module.padding
    is_padded = not isinstance(padding, str) and (not isinstance(padding, tuple) or any(padding))
    is_padded = is_padded or any(module._reversed_padding_repeated_twice)
    return not is_padded and isinstance(stride, tuple) and len(stride) == len(module.kernel_size)


def rows_are_outputs(layout: Layout) -> bool:
    """Whether the rows of a convolution's weight are its output channels."""
    return layout == Layout.of(layout.shape, inputs=range(1, len(layout.shape)))


def refuses_linear(module: Any, matrix: PreparedWeight, x: Tensor) -> str | None:
    """Say why the kernels of linear layers do not compute a convolution of kernel size 1; None if they do.

    Args:
        module: A convolution that `is_pointwise` accepts.
        matrix: Its weight: (outputs, channels).
        x: The inputs: (batch, channels, spatial...), or without the batch axis.
    """
    if not _fits(module, x):
        return "the input does not fit"
    count = places(module, x)
    return f"{count} places are more than {MOST_PLACES}" if count > MOST_PLACES else _refuses_call(x, matrix.weight)


def _fits(module: Any, x: Tensor) -> bool:
    spatial = len(module.kernel_size)
    return x.dim() in (spatial + 1, spatial + 2) and x.shape[-spatial - 1] == module.in_channels


def places(module: Any, x: Tensor) -> int:
    """Count the places of the outputs of a convolution, without the effects of padding, in all samples."""
    stride = module.stride if isinstance(module.stride, tuple) else (module.stride,)
    stride = stride * len(module.kernel_size) if len(stride) == 1 else stride
    return _thinned(x, stride).numel() // int(module.in_channels)


def linear_over_places(module: Any, matrix: PreparedWeight, x: Tensor, bias: Tensor | None) -> Tensor:
    """Compute a convolution that `refuses_linear` accepts.

    Args:
        module: The convolution.
        matrix: Its weight: (outputs, channels).
        x: The inputs: (batch, channels, spatial...), or without the batch axis.
        bias: (outputs,).

    Returns:
        (batch, outputs, spatial...), in the dtype of `x`; in the order of memory that torch's convolution gives.
    """
    spatial = len(module.kernel_size)
    rows = _thinned(x, module.stride).movedim(-spatial - 1, -1)
    output = linear(rows, matrix, bias).movedim(-1, -spatial - 1)
    order = _CHANNELS_LAST.get(spatial) if x.dim() == spatial + 2 and not x.is_contiguous() else None
    return output if order is not None and x.is_contiguous(memory_format=order) else output.contiguous()


def _thinned(x: Tensor, stride: Sequence[int]) -> Tensor:
    """Take every n-th place."""
    taken: Any = (..., *(slice(None, None, step) for step in stride))
    return x if set(stride) == {1} else x[taken]


def refuses_bf16(module: Any, weight: WeightLayout, x: Tensor, compute: Compute) -> str | None:
    """Say why a convolution does not compute in bfloat16; None if it does.

    Bfloat16 holds codes of 8 bits exactly. As in linear layers, inputs and outputs are rounded. That leaves 50 dB or
    more, unless sums nearly cancel. Layers with few input channels read images, whose mean is far from zero, so that
    their sums do. With few channels, float32 is faster, too.
    """
    spec, shape = weight.spec, weight.layout.shape
    if compute == "exact":
        return "compute is 'exact'"
    if module.transposed or module.groups != 1:
        return "it is transposed or has groups"
    if not rows_are_outputs(weight.layout):
        return "the rows of its weight are not its output channels"
    if spec.bits == 8 and not has_byte_rows(spec):
        return "its codes of 8 bits are not symmetric integers with a scale for each row"
    if shape[0] < FEW_OUTPUTS or shape[1] < FEW_INPUTS:
        return f"{shape[0]} channels out of {shape[1]} are too few for 50 dB in bfloat16"
    if weight.scale.dtype == torch.float64:
        return "it has float64 scales, which need float64 products"
    if not features.has_bf16():
        return "this CPU has no instructions for bfloat16"
    if weight.layout.columns < LEAST_PRODUCTS:
        return f"{weight.layout.columns} products for each output are fewer than {LEAST_PRODUCTS}"
    if not _fits(module, x):
        return "the input does not fit"
    if spec.bits < 8 and (count := places(module, x)) < LEAST_PLACES:
        return f"{count} places are fewer than {LEAST_PLACES}"
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


def convolved_in_bf16(
    convolve: Callable[[Tensor, Tensor, Tensor | None], Tensor], x: Tensor, weight: WeightLayout, bias: Tensor | None
) -> Tensor:
    """Convolve in bfloat16. Codes of 8 bits are used as they are, and the sums scaled; other weights are decoded first.

    Args:
        convolve: Takes input, weight and bias.
        x: The inputs: (batch, channels, spatial...), or without the batch axis.
        weight: A weight that `refuses_bf16` accepts.
        bias: (outputs,).

    Returns:
        The outputs, in the dtype of `x`.
    """
    by_row = has_byte_rows(weight.spec)
    factors = _signed(weight).to(torch.bfloat16) if by_row else weight.dequantize(torch.bfloat16)
    output = convolve(x.to(torch.bfloat16), factors, None).float()
    along = (-1, *[1] * (factors.dim() - 2))
    if by_row:
        scale = weight.scale.float().view(along)
        output = output.mul_(scale) if bias is None else torch.addcmul(bias.float().view(along), output, scale)
    elif bias is not None:
        output += bias.float().view(along)
    return output.to(x.dtype)


def _signed(weight: WeightLayout) -> Tensor:
    """Return symmetric codes of 8 bits, in the shape of the weight."""
    return weight.signed_codes(slice(None)).reshape(weight.layout.shape)


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
