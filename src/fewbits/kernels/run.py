"""The forward of a linear layer: a direct call of a kernel, or an operation that can be traced and differentiated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewbits.kernels import onnx, reference
from fewbits.kernels.base import Kernel, PreparedWeight, TracedWeight
from fewbits.kernels.choose import choose
from fewbits.kernels.ops import product
from fewbits.kernels.reference import REFERENCE, is_transformed, is_transforming
from fewbits.numerics.read_only import ReadOnlyTensor

_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


def linear(x: Tensor, prepared: PreparedWeight | TracedWeight, bias: Tensor | None) -> Tensor:
    """Compute a layer, in the dtype of `x` or of autocast.

    The reference computes every call that no kernel takes, and reports inputs that do not fit.
    """
    if not _suits(x, prepared):
        if isinstance(x, ReadOnlyTensor):  # the weight of another layer
            return linear(x.plain, prepared, bias)
        return reference.linear(x, prepared.weight, bias)
    if torch.is_autocast_enabled("cpu"):
        # Autocast decides the dtype of inputs and output, and nothing inside of a kernel.
        x = x if prepared.weight.spec.activations else x.to(torch.get_autocast_dtype("cpu"))
        with torch.autocast("cpu", enabled=False):
            return linear(x, prepared, bias)
    if isinstance(prepared, TracedWeight):
        output: Tensor = _operation()(x, prepared.tensors, prepared.description)
    elif isinstance(prepared.weight, onnx.Constants):
        output = onnx.product(x, prepared.weight)
    elif x.requires_grad and torch.is_grad_enabled():
        if prepared.description is None:
            return reference.linear(x, prepared.weight, bias)
        output = torch.ops.fewbits.linear(x, prepared.tensors, prepared.description)
    else:
        output = product(x, prepared.weight, prepared.kernels)
    if bias is not None:
        output = output + bias
    return output if output.dtype == x.dtype else output.to(x.dtype)


def chosen(x: Tensor, prepared: PreparedWeight) -> Kernel[Any]:
    """Return the kernel that computes this call."""
    if not _suits(x, prepared):
        return REFERENCE
    return choose(prepared.kernels, x, x.numel() // prepared.columns, prepared.weight)


def rows_of(x: Tensor) -> int:
    """Count the rows of a layer's input: its vectors along the last axis."""
    return x.numel() // x.shape[-1] if x.dim() and x.shape[-1] else 0


def _operation() -> Any:
    """Return the operation of a layer that is traced: an exported program chooses kernels when it runs."""
    compiles = torch.compiler.is_dynamo_compiling() and not _is_exporting()
    return torch.ops.fewbits.compiled_linear if compiles else torch.ops.fewbits.linear


def _is_exporting() -> bool:
    # Torch before 2.7 cannot tell; nothing is traced then.
    return not hasattr(torch.compiler, "is_exporting") or torch.compiler.is_exporting()


def _suits(x: Tensor, prepared: PreparedWeight | TracedWeight) -> bool:
    """Whether kernels compute with this input: a plain tensor of the right size, without transforms."""
    # Each line costs time at every call; a small layer takes as long as ten such lines.
    if x.dtype not in _DTYPES or not x.dim():
        return False
    if isinstance(prepared, TracedWeight):  # the operation checks the size
        return not is_transforming()
    if not prepared.kernels or x.shape[-1] != prepared.columns:
        return False
    if torch.compiler.is_compiling():  # for ONNX
        return not is_transforming()
    plain = type(x) is Tensor and x.device == prepared.device and x.layout is torch.strided
    return plain and not is_transformed(x)
