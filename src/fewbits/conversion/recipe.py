"""Describe values as JSON, so that two runs can compare the inputs of their codes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor

from fewbits.checkpoint.digests import digest
from fewbits.conversion.staging import INCOMPARABLE


def described(value: object) -> Any:
    """Describe a value as JSON. Two descriptions are equal only if the values are alike.

    A value without visible contents, such as a function or an open file, becomes `INCOMPARABLE`.
    """
    return _described(value, {})


def _described(value: object, seen: dict[int, object]) -> Any:
    # `seen` guards against cycles. It holds the objects, so that no id is reused.
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, Tensor):
        return [str(value.dtype), list(value.shape), _bytes(value)]
    if isinstance(value, (torch.dtype, torch.device, PurePath, type)):
        return f"{value.__module__}.{value.__qualname__}" if isinstance(value, type) else str(value)
    if id(value) in seen:
        return ["as before", list(seen).index(id(value))]
    seen[id(value)] = value
    if isinstance(value, Mapping):
        return _mapping(value, seen)
    if isinstance(value, (list, tuple)):
        return [_described(one, seen) for one in value]
    if isinstance(value, (set, frozenset)):
        return sorted((_described(one, seen) for one in value), key=repr)
    fields = _fields(value)
    return INCOMPARABLE if fields is None else [_described(type(value), seen), _mapping(fields, seen)]


def _mapping(values: Mapping[Any, object], seen: dict[int, object]) -> Any:
    return sorted(([_described(key, seen), _described(one, seen)] for key, one in values.items()), key=repr)


def _bytes(tensor: Tensor) -> str:
    try:
        return digest(tensor.detach().cpu().contiguous())
    except RuntimeError:  # a tensor without memory, such as one on the meta device
        return INCOMPARABLE


def _fields(value: object) -> dict[str, object] | None:
    """The fields of an attrs object, or the attributes of another; None for callables and built-in objects."""
    slots = getattr(type(value), "__attrs_attrs__", None)
    if slots is not None:
        return {field.name: getattr(value, field.name) for field in slots}
    if callable(value) or type(value).__module__ == "builtins":
        return None
    return dict(vars(value)) if hasattr(value, "__dict__") else None


def fingerprint(value: object) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
