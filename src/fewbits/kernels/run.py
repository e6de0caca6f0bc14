"""A linear layer's forward: straight to a kernel, or by the operation where something traces or differentiates it."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from fewbits.kernels import reference
from fewbits.kernels.base import Kernel, Operand
from fewbits.kernels.choose import choose
from fewbits.kernels.ops import product
from fewbits.kernels.prepared import PreparedWeight
from fewbits.kernels.reference import REFERENCE
from fewbits.kernels.transforms import is_transformed, is_transforming
from fewbits.numerics.read_only import ReadOnlyTensor

_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


class Prepacked(Operand, Protocol):
    """A stored weight with its kernels. `StoredWeight` is one."""

    def prepared(self) -> PreparedWeight | None:
        """The weight as it lies in memory now; None if no kernel ever computes with it."""


def linear(x: Tensor, weight: Prepacked, bias: Tensor | None) -> Tensor:
    """The output of a layer, in the dtype of `x`, or autocast's.

    What no kernel takes, inputs that do not fit included, is the reference's.
    """
    prepared = weight.prepared()
    if prepared is None:
        return reference.linear(x, weight, bias)
    if not _suits(x, prepared):
        if isinstance(x, ReadOnlyTensor):  # the weight of another layer
            return linear(x.plain, weight, bias)
        return reference.linear(x, prepared.form, bias)
    if torch.is_autocast_enabled("cpu"):
        # Its dtype is that of inputs and output; what a kernel does in between is the kernel's.
        x = x if prepared.form.spec.activations else x.to(torch.get_autocast_dtype("cpu"))
        with torch.autocast("cpu", enabled=False):
            return linear(x, weight, bias)
    if (x.requires_grad and torch.is_grad_enabled()) or torch.compiler.is_compiling():
        if prepared.description is None:
            return reference.linear(x, prepared.form, bias)
        output: Tensor = torch.ops.fewbits.linear(x, prepared.tensors, prepared.description)
    else:
        output = product(x, prepared.form, prepared.kernels)
    if bias is not None:
        output = output + bias
    return output if output.dtype == x.dtype else output.to(x.dtype)


def chosen(x: Tensor, prepared: PreparedWeight) -> Kernel[Any]:
    """The kernel that computes this call."""
    return choose(prepared.kernels, x, x.numel() // prepared.columns) if _suits(x, prepared) else REFERENCE


def rows_of(x: Tensor) -> int:
    """Count the rows of a layer's input: its vectors along the last axis."""
    return x.numel() // x.shape[-1] if x.dim() and x.shape[-1] else 0


def _suits(x: Tensor, prepared: PreparedWeight) -> bool:
    """Whether kernels compute with such an input: a plain one that fits, and no transform at work."""
    # Each line is paid at every call of a layer that may take no longer than ten of them.
    if not prepared.kernels or x.dtype not in _DTYPES or not x.dim() or x.shape[-1] != prepared.columns:
        return False
    if torch.compiler.is_compiling():
        return not is_transforming()
    plain = type(x) is Tensor and x.device == prepared.device and x.layout is torch.strided
    return plain and not is_transformed(x)
