"""A linear layer's forward: straight to a kernel, or by the operation where something traces or differentiates it."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fewbits.kernels import reference
from fewbits.kernels.base import Kernel, Operand
from fewbits.kernels.choose import choose
from fewbits.kernels.forms import Form
from fewbits.kernels.ops import product
from fewbits.kernels.reference import REFERENCE

_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


class Prepacked(Operand, Protocol):
    """A stored weight with its kernels. `StoredWeight` is one.

    Attributes:
        kernels: that compute with it, the most preferred first; none where the reference does.
        description: see `fewbits.kernels.ops`; None where its form is the canonical one.
    """

    kernels: tuple[Kernel[Any], ...]
    description: str | None

    @property
    def columns(self) -> int:
        """How many inputs a row of the weight has."""

    def form(self) -> Form:
        """The weight, as kernels see it."""

    def form_tensors(self) -> list[Tensor]:
        """Its tensors, in the order of the description."""


def linear(x: Tensor, weight: Prepacked, bias: Tensor | None) -> Tensor:
    """The output of a layer, in the dtype of `x`, or autocast's.

    What no kernel takes, inputs that do not fit included, is the reference's.
    """
    if not _fits(x, weight):
        return reference.linear(x, weight, bias)
    if torch.is_autocast_enabled("cpu"):
        # Its dtype is that of inputs and output; what a kernel does in between is the kernel's.
        x = x if weight.spec.activations else x.to(torch.get_autocast_dtype("cpu"))
        with torch.autocast("cpu", enabled=False):
            return linear(x, weight, bias)
    compiling = torch.compiler.is_compiling()
    if not compiling and (type(x) is not Tensor or _is_transformed(x)):
        return reference.linear(x, weight, bias)
    if compiling or (x.requires_grad and torch.is_grad_enabled()):
        if weight.description is None:
            return reference.linear(x, weight, bias)
        output: Tensor = torch.ops.fewbits.linear(x, weight.form_tensors(), weight.description)
    else:
        output = product(x, weight.form(), weight.kernels)
    if bias is not None:
        output = output + bias
    return output if output.dtype == x.dtype else output.to(x.dtype)


def _is_transformed(x: Tensor) -> bool:
    """Whether a transform of torch.func, or forward mode, is at work: they know no kernel's operations."""
    return torch._C._functorch.is_functorch_wrapped_tensor(x) or forward_ad._current_level >= 0


def chosen(x: Tensor, weight: Prepacked) -> Kernel[Any]:
    """The kernel that computes this call."""
    return choose(weight.kernels, x, x.numel() // weight.columns) if _fits(x, weight) else REFERENCE


def _fits(x: Tensor, weight: Prepacked) -> bool:
    return bool(weight.kernels) and x.dim() > 0 and x.shape[-1] == weight.columns and x.dtype in _DTYPES
