"""Express float8 tensors as codes with levels, so that they decode like any other codes."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fewbits.numerics.levels import E4M3, E5M2
from fewbits.numerics.spec import Granularity, QuantSpec

_LEVELS = {torch.float8_e4m3fn: E4M3, torch.float8_e5m2: E5M2}

#: The float8 dtypes that can be read.
FLOAT8_DTYPES = tuple(_LEVELS)


def float8_spec(
    dtype: torch.dtype, granularity: Granularity, group_size: int | None, scale_dtype: torch.dtype
) -> QuantSpec:
    """Build a spec whose levels are the finite numbers of a float8 dtype."""
    return QuantSpec(8, granularity, group_size, scale_dtype=scale_dtype, levels=_LEVELS[dtype])


def float8_codes(values: Tensor) -> Tensor | None:
    """Return the uint8 codes of float8 numbers for `float8_spec`; None if a number is NaN or Inf."""
    codes = _codes(values.dtype)[values.contiguous().view(torch.uint8).int()]
    return None if bool((codes < 0).any()) else codes.to(torch.uint8)


def float8_dtype(spec: QuantSpec) -> torch.dtype | None:
    """Return the float8 dtype whose finite numbers are the levels of a spec; None if there is none."""
    return next((dtype for dtype, levels in _LEVELS.items() if spec.levels == levels), None)


def float8_values(codes: Tensor, spec: QuantSpec) -> Tensor:
    """Return the float8 numbers of signed codes; the inverse of `float8_codes`.

    Args:
        codes: signed codes, each with a level.
        spec: a spec with a `float8_dtype`.
    """
    levels = torch.tensor(spec.levels, device=codes.device).to(float8_dtype(spec))
    return levels.view(torch.uint8)[codes.long() - spec.code_min].view(levels.dtype)


@cache
def float8_numbers(dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Return the numbers that the 256 bytes encode, float32."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).to(torch.float32).to(device or "cpu")


@cache
def _codes(dtype: torch.dtype) -> Tensor:
    """Return the code of each of the 256 bytes, int16; -1 for NaN and Inf."""
    values, levels = float8_numbers(dtype), torch.tensor(_LEVELS[dtype])
    return torch.where(torch.isfinite(values), torch.searchsorted(levels, values), -1).to(torch.int16)
