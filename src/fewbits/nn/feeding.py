"""`feed`: how one batch reaches a model's forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn


def feed(model: nn.Module, batch: Any) -> Any:
    """Call a model with one batch.

    A tuple is passed as positional arguments, a mapping as keyword arguments, anything else as the only argument. A
    model such as `SentenceTransformer` takes the whole mapping as its first argument: that is done where the signature
    of its forward does not accept the keys as keyword arguments, and accepts one positional argument.
    """
    if isinstance(batch, tuple):
        return model(*batch)
    if isinstance(batch, Mapping) and not _is_one_argument(model.forward, batch):
        return model(**batch)
    return model(batch)


def _is_one_argument(forward: Callable[..., Any], batch: Mapping[Any, Any]) -> bool:
    """Whether a forward asks for the mapping itself, and not for what is in it."""
    try:
        signature = inspect.signature(forward)
    except (TypeError, ValueError):  # TorchScript and C functions have none
        return False
    if _binds(signature, **{str(key): value for key, value in batch.items()}):
        return False
    # A key that names a parameter tells that the others are misspelt keyword arguments.
    return signature.parameters.keys().isdisjoint(batch) and _binds(signature, batch)


def _binds(signature: inspect.Signature, *args: Any, **kwargs: Any) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True
