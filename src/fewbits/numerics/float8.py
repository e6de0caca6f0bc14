"""Express float8 tensors as codes with levels, so that they decode like any other codes."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fewbits.numerics.spec import Granularity, QuantSpec

#: The float8 dtypes that can be read.
FLOAT8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


def float8_spec(
    dtype: torch.dtype, granularity: Granularity, group_size: int | None, scale_dtype: torch.dtype
) -> QuantSpec:
    """Build a spec whose levels are the finite numbers of a float8 dtype.

    A float8 dtype has fewer finite numbers than 8-bit codes exist. The remaining codes, which no tensor uses, continue
    after the largest number at the same distance.
    """
    finite = _finite(dtype)
    step = finite[-1] - finite[-2]
    beyond = [finite[-1] + step * index for index in range(1, 257 - len(finite))]
    return QuantSpec(8, granularity, group_size, scale_dtype=scale_dtype, levels=(*finite, *beyond))


def float8_codes(values: Tensor) -> Tensor | None:
    """Return the uint8 codes of float8 numbers for `float8_spec`; None if a number is NaN or Inf."""
    codes = _codes(values.dtype)[values.contiguous().view(torch.uint8).int()]
    return None if bool((codes < 0).any()) else codes.to(torch.uint8)


@cache
def float8_numbers(dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Return the numbers that the 256 bytes encode, float32."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).to(torch.float32).to(device or "cpu")


@cache
def _finite(dtype: torch.dtype) -> tuple[float, ...]:
    values = float8_numbers(dtype)
    return tuple(sorted(set(values[torch.isfinite(values)].tolist())))


@cache
def _codes(dtype: torch.dtype) -> Tensor:
    """Return the code of each of the 256 bytes, int16; -1 for NaN and Inf."""
    values, levels = float8_numbers(dtype), torch.tensor(_finite(dtype))
    return torch.where(torch.isfinite(values), torch.searchsorted(levels, values), -1).to(torch.int16)
