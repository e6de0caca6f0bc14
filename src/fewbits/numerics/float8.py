"""Floats of eight bits as codes with levels: what was scaled and cast to float8 decodes like everything else."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fewbits.numerics.spec import Granularity, QuantSpec

#: The dtypes that are read.
FLOAT8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


def float8_spec(
    dtype: torch.dtype, granularity: Granularity, group_size: int | None, scale_dtype: torch.dtype
) -> QuantSpec:
    """A spec whose levels are the finite numbers of a float8 dtype.

    There are fewer of them than codes of 8 bits. The codes that are left over come after the largest number, at the
    distance that is usual there; no tensor has them.
    """
    finite = _finite(dtype)
    step = finite[-1] - finite[-2]
    beyond = [finite[-1] + step * index for index in range(1, 257 - len(finite))]
    return QuantSpec(
        8, granularity, group_size=group_size, scale_dtype=scale_dtype, levels=(*finite, *beyond)
    )  # fmt: skip


def float8_codes(values: Tensor) -> Tensor | None:
    """The codes of float8 numbers, uint8, for `float8_spec`; None if there is NaN or Inf among them."""
    codes = _codes(values.dtype)[values.contiguous().view(torch.uint8).int()]
    return None if bool((codes < 0).any()) else codes.to(torch.uint8)


@cache
def _finite(dtype: torch.dtype) -> tuple[float, ...]:
    values = _all(dtype)
    return tuple(sorted(set(values[torch.isfinite(values)].tolist())))


@cache
def _codes(dtype: torch.dtype) -> Tensor:
    """The code of each of the 256 bytes, int16; -1 for NaN and Inf."""
    values, levels = _all(dtype), torch.tensor(_finite(dtype))
    return torch.where(torch.isfinite(values), torch.searchsorted(levels, values), -1).to(torch.int16)


def _all(dtype: torch.dtype) -> Tensor:
    """What the 256 bytes stand for, float32."""
    return torch.arange(256).to(torch.uint8).view(dtype).float()
