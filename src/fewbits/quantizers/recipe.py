"""What decides on the codes of a run, in words that two processes can compare."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fewbits.checkpoint.saving import digest


def described(value: object) -> Any:
    """A value as JSON: equal for two values only if they are alike.

    What nobody can look into, such as a function or an open file, is never like anything, not even like itself.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, Tensor):
        return [str(value.dtype), list(value.shape), digest(value.detach().cpu().contiguous())]
    if isinstance(value, (torch.dtype, torch.device, type)):
        return f"{value.__module__}.{value.__qualname__}" if isinstance(value, type) else str(value)
    if isinstance(value, Mapping):
        return sorted(([described(key), described(one)] for key, one in value.items()), key=repr)
    if isinstance(value, (list, tuple)):
        return [described(one) for one in value]
    if isinstance(value, (set, frozenset)):
        return sorted((described(one) for one in value), key=repr)
    fields = _fields(value)
    return secrets.token_hex(16) if fields is None else [described(type(value)), described(fields)]


def _fields(value: object) -> dict[str, object] | None:
    """What an object is made of; None if that cannot be seen."""
    slots = getattr(type(value), "__attrs_attrs__", None)
    if slots is not None:
        return {field.name: getattr(value, field.name) for field in slots}
    if callable(value) or type(value).__module__ == "builtins":
        return None
    return dict(vars(value)) if hasattr(value, "__dict__") else None


def fingerprint(value: object) -> str:
    """A digest of a description."""
    return hashlib.sha256(repr(described(value)).encode()).hexdigest()
