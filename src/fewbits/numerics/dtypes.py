"""Names of dtypes in files, and the dtypes that arithmetic runs in."""

from __future__ import annotations

import torch

from fewbits.errors import ArgumentError

#: Floating dtypes that a weight, and a scale, may have.
FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def dtype_name(dtype: torch.dtype) -> str:
    """The name used in files and messages: ``torch.bfloat16`` is ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def dtype_from_name(name: str) -> torch.dtype:
    """The inverse of `dtype_name`.

    Raises:
        ArgumentError: if torch has no dtype of that name.
    """
    # Not `getattr`: it imports modules of torch that are asked for by name.
    dtype = vars(torch).get(name) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype):
        raise ArgumentError(f"{name!r} is not the name of a torch dtype (such as 'float32' or 'bfloat16')")
    return dtype


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that codes are computed in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32
