"""FP8 weights with scales as other tools store them, and the same maths written another way."""

import math

import torch
from hypothesis import strategies as st

from fewbits.numerics.scaled import FP8_DTYPES

FP8 = st.sampled_from(FP8_DTYPES)
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def codes(shape, dtype=torch.float8_e4m3fn, seed=0):
    """Every finite code, at random."""
    all_codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    finite = all_codes.float().isfinite().nonzero().flatten()
    generator = torch.Generator().manual_seed(seed)
    picked = finite[torch.randint(len(finite), (math.prod(shape),), generator=generator)]
    return all_codes.view(torch.uint8)[picked].view(dtype).reshape(shape)


def scales(shape, dtype=torch.float32, seed=0):
    """From a thousandth to one hundredth."""
    generator = torch.Generator().manual_seed(seed + 1)
    return (torch.rand(shape, generator=generator) * 0.009 + 0.001).to(dtype)


def scale_shape(shape, block):
    """One scale for each block of the last two axes."""
    return (*shape[:-2], math.ceil(shape[-2] / block[0]), math.ceil(shape[-1] / block[1]))


def expected(weight, scale, block=None):
    """A dequantized weight, computed at once with a scale for each element."""
    scale = scale.to(torch.float32)
    if block is None:
        scale = scale.reshape(*scale.shape, *[1] * (weight.dim() - scale.dim())) if scale.numel() > 1 else scale
        return (weight.to(torch.float32) * scale).to(torch.bfloat16).reshape(weight.shape)
    rows, columns = weight.shape[-2:]
    each = scale.repeat_interleave(block[0], -2)[..., :rows, :].repeat_interleave(block[1], -1)[..., :columns]
    return (weight.to(torch.float32) * each).to(torch.bfloat16)
