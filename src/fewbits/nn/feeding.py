"""`feed`: call a model with one batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn


def feed(model: nn.Module, batch: Any) -> Any:
    """Call a model with one batch.

    A tuple is passed as positional arguments, a mapping as keyword arguments, anything else as the only argument. If a
    forward does not accept the keys of a mapping as keyword arguments, and accepts one positional argument, as that of
    `SentenceTransformer` does, the whole mapping is that argument.
    """
    if isinstance(batch, tuple):
        return model(*batch)
    if isinstance(batch, Mapping) and not _is_one_argument(model.forward, batch):
        return model(**batch)
    return model(batch)


def _is_one_argument(forward: Callable[..., Any], batch: Mapping[Any, Any]) -> bool:
    """Whether a forward takes the mapping itself as its argument."""
    try:
        signature = inspect.signature(forward)
    except (TypeError, ValueError):  # TorchScript and C functions have no signature
        return False
    if _binds(signature, **{str(key): value for key, value in batch.items()}):
        return False
    # If one key is the name of a parameter, the other keys are misspelt keyword arguments.
    return signature.parameters.keys().isdisjoint(batch) and _binds(signature, batch)


def _binds(signature: inspect.Signature, *args: Any, **kwargs: Any) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True
