"""Names of dtypes in files, and the dtypes used for arithmetic."""

from __future__ import annotations

import torch

from fewbits.errors import ArgumentError

#: The dtypes that weights and scales may have.
FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name used in files and messages: ``torch.bfloat16`` is ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def dtype_from_name(name: str) -> torch.dtype:
    """Return the dtype of that name; the inverse of `dtype_name`.

    Raises:
        ArgumentError: if torch has no dtype of that name.
    """
    # `getattr` would import a torch submodule of that name.
    dtype = vars(torch).get(name) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype):
        raise ArgumentError(f"{name!r} is not the name of a torch dtype (such as 'float32' or 'bfloat16')")
    return dtype


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that codes are computed in: float64 for float64, float32 for narrower dtypes."""
    return torch.float64 if dtype == torch.float64 else torch.float32
