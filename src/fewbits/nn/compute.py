"""`set_compute`: what the layers of a quantized model may do to be fast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fewbits._heap import trim
from fewbits.errors import ArgumentError
from fewbits.kernels.base import Compute, Kernel
from fewbits.kernels.choose import check_compute
from fewbits.nn.stored import PackedWeight, StoredWeight


@torch.no_grad()
def set_compute(model: nn.Module, compute: Compute, kernels: Sequence[Kernel[Any]] | None = None) -> None:
    """Choose how the linear layers of a quantized model compute, one layer at a time.

    It is a choice of this process: files, state dicts and the ledger do not know it.

    Args:
        model: a quantized model.
        compute: ``"auto"``, kernels whose output reads 50 dB or more against float64 with the same codes, or 10 dB more
            than rounding the weights has left. ``"exact"``, dequantize and one `F.linear`, in the input's dtype.
            ``"int8"``, inputs may be rounded to int8 too, one scale for each row. Schemes with int8 activations have
            the same numbers under all three.
        kernels: to choose from, the most preferred first; None stands for those of fewbits. Behind them there is
            always the reference.

    Raises:
        ArgumentError: for anything else, and for a model without a quantized layer.
    """
    check_compute(compute)
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"set_compute takes a model, not a {type(model).__name__}")
    if not any(isinstance(module, StoredWeight) for module in model.modules()):
        raise ArgumentError(
            f"no layer of this {type(model).__name__} is quantized, so there is nothing to choose; pass the quantized "
            "model: quantize returns a copy, in result.model, unless it is called with inplace=True"
        )
    if kernels is not None and not (isinstance(kernels, Sequence) and all(isinstance(k, Kernel) for k in kernels)):
        raise ArgumentError(f"kernels must be a sequence of Kernel instances, or None, not {kernels!r}")
    prepack(model, compute, kernels)


@torch.no_grad()
def prepack(
    model: nn.Module, compute: Compute, kernels: Sequence[Kernel[Any]] | None = None, *, reuse_memory: bool = False
) -> None:
    """`set_compute`, of a model that may be so new that its words may be written over."""
    for module in model.modules():
        if isinstance(module, PackedWeight):
            module.prepack(compute, kernels, reuse_memory=reuse_memory)
    trim()
