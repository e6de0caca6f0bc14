"""`StoredWeight`: a weight as a module holds it, shared by all layers with that weight.

Also: how a module reads its stored weights as float tensors.
"""

from __future__ import annotations

import functools
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.errors import FormatError
from fewbits.nn.coded import CodedTensor
from fewbits.numerics.dtypes import dtype_name
from fewbits.numerics.layout import Layout
from fewbits.numerics.read_only import ReadOnlyTensor
from fewbits.numerics.spec import CastSpec, Spec
from fewbits.numerics.tensor import QuantizedTensor

#: A quantized parameter ``p`` lives in a child module ``p_stored``.
SUFFIX = "_stored"

#: The weights that the running forward dequantizes at most once, with their float tensors; None before the first read.
_once: ContextVar[dict[StoredWeight, Tensor | None] | None] = ContextVar("fewbits_once", default=None)

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class StoredWeight(nn.Module, ABC):
    """The stored form of one weight.

    Layers with tied weights hold the same instance, so they stay tied through ``.to``, deepcopy and pickle. Its buffers
    never change dtype: ``.half()`` and similar calls change only the default dtype of `dequantize`, so that a scale is
    never rounded twice and never becomes 0 or Inf.

    Attributes:
        spec: How the weight is stored.
        layout: How the weight was cut into rows and columns; None if it has no codes.
        dtype: The dtype that `dequantize` returns by default; the dtype of the float weight.
        trainable: Whether the float parameter required gradients.
        computes: Whether kernels compute with the weight; otherwise a forward reads it as a float tensor.
        is_read: Whether a forward that is not of fewbits reads the weight; kernels may compute its products.
        is_pointwise: Whether a convolution uses it as a matrix, and kernels may compute the products.
        is_decoded: Whether a convolution or an embedding holds it, which decodes it, or rows of it, at every call.
    """

    spec: Spec
    layout: Layout | None = None
    dtype: torch.dtype
    trainable: bool = True
    computes: bool = False
    is_read: bool = False
    is_pointwise: bool = False
    is_decoded: bool = False

    @abstractmethod
    def value(self) -> QuantizedTensor | Tensor:
        """Return the stored value."""

    @abstractmethod
    def parts(self) -> dict[str, Tensor]:
        """Return the tensors for a state dict, by the suffix that their keys add to the parameter's name."""

    @property
    def suffixes(self) -> list[str]:
        """The keys of `parts`."""
        return list(self.parts())

    def parts_in(self, destination: Mapping[str, Tensor], key: str) -> dict[str, Tensor]:
        """Return the parts, detached, for a state dict that holds them under this key."""
        return {suffix: part.detach() for suffix, part in self.parts().items()}

    def storage_spec(self) -> list[Any]:
        """Return spec and layout as plain values: the parts do not hold them."""
        return [self.spec.to_dict(), None if self.layout is None else self.layout.to_dict()]

    @abstractmethod
    def load_parts(self, parts: dict[str, Tensor], *, assign: bool) -> None:
        """Take over other parts of the same shapes: copy them in place, or assign them."""

    @abstractmethod
    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight in its own shape, in memory of its own."""

    def read(self) -> Tensor:
        """Return the weight for a forward that is not of fewbits."""
        return self.dequantize()

    def operand(self, dtype: torch.dtype) -> Tensor:
        """Return the weight to compute with. Callers must not write to it, because it may be the stored tensor."""
        return self.dequantize(dtype)

    @abstractmethod
    def dequantize_rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Return rows of a matrix: (len(index), columns)."""

    def extra_repr(self) -> str:
        """Describe how the weight is stored."""
        return f"{self.spec}, reads as {dtype_name(self.dtype)}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        buffers = dict(self._buffers)
        for name, buffer in buffers.items():
            if buffer is None:
                continue
            # A view as integers: changes of dtype do not apply to it, changes of device and memory do.
            integers = buffer.view(_INTEGERS[buffer.element_size()])
            moved = fn(integers)
            if moved.dtype != integers.dtype:
                moved = integers.to(moved.device)
            buffers[name] = moved.view(buffer.dtype)
            self.dtype = fn(torch.empty(0, dtype=self.dtype, device=buffer.device)).dtype
        # One assignment: another thread may be reading.
        self._buffers = buffers
        return self

    # The layer that holds this weight writes and reads its keys, under the parameter's own name.
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        _, strict, _, unexpected_keys, _ = rest
        if strict:
            unexpected_keys += [key for key in state_dict if key.startswith(prefix)]


class CastWeight(StoredWeight):
    """A weight in a narrower floating dtype."""

    narrow: Tensor

    def __init__(self, value: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.spec = dtype, CastSpec(value.dtype)
        self.register_buffer("narrow", value)

    def value(self) -> Tensor:
        """Return the narrow tensor itself."""
        return self.narrow

    def parts(self) -> dict[str, Tensor]:
        """Return the narrow tensor, under the parameter's own name."""
        return {"": self.narrow}

    def load_parts(self, parts: dict[str, Tensor], *, assign: bool) -> None:
        """Take over another tensor of the same shape and dtype."""
        value = parts[""]
        if (value.shape, value.dtype) != (self.narrow.shape, self.narrow.dtype):
            raise FormatError(
                f"a weight of shape {tuple(self.narrow.shape)} in {dtype_name(self.narrow.dtype)} cannot take "
                f"shape {tuple(value.shape)} in {dtype_name(value.dtype)}"
            )
        self.narrow = value if assign else self.narrow.copy_(value)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight, cast to `dtype`, in memory of its own."""
        return self.narrow.to(dtype or self.dtype, copy=True)

    def operand(self, dtype: torch.dtype) -> Tensor:
        """Return the weight, cast to `dtype` if it has another."""
        return self.narrow.to(dtype)

    def dequantize_rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Return rows of a matrix."""
        return self.narrow.index_select(0, index).to(dtype)


def stored_weights(module: nn.Module) -> dict[str, StoredWeight]:
    """Return the stored weights that a module itself holds, by parameter name."""
    return {
        name.removesuffix(SUFFIX): child for name, child in module._modules.items() if isinstance(child, StoredWeight)
    }


def part_of(module: nn.Module, name: str) -> Tensor | None:
    """Return the part of a stored weight that the module's state dict holds under this name; None if there is none."""
    for child_name, child in module.__dict__.get("_modules", {}).items():
        local = child_name.removesuffix(SUFFIX)
        if isinstance(child, StoredWeight) and name.startswith(local) and name.removeprefix(local) in child.suffixes:
            return child.parts()[name.removeprefix(local)]
    return None


def reading_once(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a forward so that each quantized parameter is dequantized once per call, however often it is read."""

    @functools.wraps(forward)
    def reading(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # a compiler removes repeated computations by itself
            return forward(self, *args, **kwargs)
        token = _once.set(dict.fromkeys(self.read_together()))
        try:
            result = forward(self, *args, **kwargs)
            # Outside of the forward, a weight is a tensor like any other.
            return result.floats if isinstance(result, CodedTensor) else result
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
        if _is_forward_of_torch(sys._getframe(2)):
            return stored.read()
        return ReadOnlyTensor.of(stored.dequantize(), f"{type(module).__name__}.{name} is quantized ({stored.spec})")
    held = weights[stored]
    if held is None or (held.is_inference() and not torch.is_inference_mode_enabled()):
        held = weights[stored] = stored.read()
    return held


def _is_forward_of_torch(frame: FrameType) -> bool:
    # Attention and transformer layers of torch read the weights of their children. They take their fast path, whose
    # bits differ, only if no weight is of a subclass of Tensor: coded weights are, and read-only ones would be.
    return frame.f_code.co_name == "forward" and frame.f_globals.get("__name__", "").startswith("torch.nn.modules.")
