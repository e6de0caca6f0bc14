"""Read a quantized parameter as a float tensor: once in each forward, and read-only outside of it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextvars import ContextVar
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.nn.stored import StoredWeight
from fewbits.numerics.read_only import ReadOnlyTensor

#: The weights that the running forward dequantizes at most once, with their float tensors; None before the first read.
_once: ContextVar[dict[StoredWeight, Tensor | None] | None] = ContextVar("fewbits_once", default=None)


def reading_once(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a forward so that each quantized parameter is dequantized once per call, however often it is read."""

    @functools.wraps(forward)
    def reading(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # a compiler removes repeated computations by itself
            return forward(self, *args, **kwargs)
        token = _once.set(dict.fromkeys(self.read_together()))
        try:
            return forward(self, *args, **kwargs)
        finally:
            _once.reset(token)

    return reading


def reads(module: nn.Module, name: str, stored: StoredWeight) -> bool:
    """Whether reading this attribute gives the stored weight; a class may compute its attributes differently."""
    probe = torch.empty(0)
    token = _once.set({stored: probe})
    try:
        return getattr(module, name, None) is probe
    finally:
        _once.reset(token)


def read(module: nn.Module, name: str, stored: StoredWeight) -> Tensor:
    """Dequantize a weight for ``module.name``; the tensor is read-only outside of the module's forward."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return stored.dequantize()
    weights = _once.get()
    if weights is None or stored not in weights:
        weight = stored.dequantize()
        label = f"{type(module).__name__}.{name} is quantized ({stored.spec})"
        return weight if _is_forward_of_torch(sys._getframe(2)) else ReadOnlyTensor.of(weight, label)
    held = weights[stored]
    if held is None or (held.is_inference() and not torch.is_inference_mode_enabled()):
        held = weights[stored] = stored.dequantize()
    return held


def _is_forward_of_torch(frame: FrameType) -> bool:
    # Attention and transformer layers of torch read the weights of their children. They take their fast path, whose
    # bits differ, only if no weight is of a subclass of Tensor.
    return frame.f_code.co_name == "forward" and frame.f_globals.get("__name__", "").startswith("torch.nn.modules.")
