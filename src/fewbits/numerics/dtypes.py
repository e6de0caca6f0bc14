"""Names of dtypes in files, descriptions for JSON, and the dtypes used for arithmetic."""

from __future__ import annotations

from typing import Any

import attrs
import torch

from fewbits.errors import ArgumentError

#: The dtypes that weights may have.
FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

#: Powers of two in one byte: the scales of the OCP Microscaling formats. Torch 2.6 has no such dtype: None.
POWERS_OF_TWO: torch.dtype | None = getattr(torch, "float8_e8m0fnu", None)

#: The dtypes that scales may have.
SCALE_DTYPES = (*FLOAT_DTYPES, *([] if POWERS_OF_TWO is None else [POWERS_OF_TWO]))


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
    if name == "float8_e8m0fnu" and dtype is None:
        raise ArgumentError(f"torch {torch.__version__} has no dtype float8_e8m0fnu; install torch 2.7 or later")
    if not isinstance(dtype, torch.dtype):
        raise ArgumentError(f"{name!r} is not the name of a torch dtype (such as 'float32' or 'bfloat16')")
    return dtype


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that codes are computed in: float64 for float64, float32 for narrower dtypes."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def for_json(instance: attrs.AttrsInstance) -> dict[str, Any]:
    """Describe the fields of an attrs instance: dtypes by their names, and specs and layouts by their `to_dict`."""
    return {field.name: _json_value(getattr(instance, field.name)) for field in attrs.fields(type(instance))}


def _json_value(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    if isinstance(value, tuple):
        return list(value)
    return value.to_dict() if attrs.has(type(value)) else value
