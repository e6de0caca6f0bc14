"""The exact sums of a convolution of int8 inputs, as one integer product of their patches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.kernels.forms import Form
from fewbits.kernels.integers import MOST_INPUTS, refuses_int_mm, sums_of_products


def refuses_patches(module: Any, weight: Form) -> str | None:
    """Why the sums of a layer cannot be had so; None if they can."""
    if module.transposed or module.groups != 1 or module.padding_mode != "zeros":
        return "it is transposed, has groups, or a padding that is not zeros"
    if weight.spec.bits != 8 or weight.spec.levels is not None or not weight.spec.symmetric:
        return "its codes are not symmetric ones of 8 bits"
    if weight.layout.columns > MOST_INPUTS or weight.scale.device.type != "cpu":
        return "its sums may not fit int32, or it is not on the CPU"
    return refuses_int_mm()


def sums_of_patches(codes: Tensor, module: Any, weight: Form) -> Tensor:
    """The sums of products of codes: int32, (batch, outputs, spatial...), or without the batch axis.

    Args:
        codes: int8, (batch, channels, spatial...), or without the batch axis.
        module: a convolution of torch, for its kernel size, stride, padding and dilation.
        weight: of (outputs, channels, kernel...).
    """
    spatial = len(module.kernel_size)
    if codes.dim() == spatial + 1:
        return sums_of_patches(codes.unsqueeze(0), module, weight).squeeze(0)
    # Channels last: a patch is a few long runs of bytes then.
    padded = F.pad(codes, module._reversed_padding_repeated_twice).movedim(1, -1).contiguous()
    patches = _patches(padded, module.kernel_size, module.stride, module.dilation)
    outputs = patches.shape[: 1 + spatial]
    signed = (weight.codes(slice(None)) ^ 0x80).view(torch.int8).view(weight.layout.shape).movedim(1, -1)
    # A view in which rows overlap is multiplied wrongly.
    rows = patches.reshape(math.prod(outputs), -1).contiguous()
    sums = sums_of_products(rows, signed.reshape(len(signed), -1))
    return sums.view(*outputs, -1).movedim(-1, 1)


def _patches(x: Tensor, size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """(batch, spatial..., channels) as (batch, places..., kernel..., channels); a view."""
    spans = [d * (k - 1) + 1 for k, d in zip(size, dilation, strict=True)]
    places = [(n - span) // s + 1 for n, span, s in zip(x.shape[1:-1], spans, stride, strict=True)]
    if min(places) < 1:
        raise RuntimeError(f"the kernel spans {spans}, more than the padded input, {tuple(x.shape[1:-1])}")
    first, *along, last = x.stride()
    to_next_place = [a * s for a, s in zip(along, stride, strict=True)]
    within = [a * d for a, d in zip(along, dilation, strict=True)]
    return x.as_strided((x.shape[0], *places, *size, x.shape[-1]), (first, *to_next_place, *within, last))
