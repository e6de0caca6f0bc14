"""`set_compute`: choose how the layers of a quantized model compute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fewbits._heap import trim
from fewbits.errors import ArgumentError
from fewbits.kernels.base import Compute, Kernel
from fewbits.kernels.choose import check_compute
from fewbits.kernels.weight_layouts import WeightLayout
from fewbits.nn.packed import PackedWeight
from fewbits.nn.stored import StoredWeight


@torch.no_grad()
def set_compute(model: nn.Module, compute: Compute, kernels: Sequence[Kernel[Any]] | None = None) -> None:
    """Choose how the layers of a quantized model compute.

    The setting belongs to this process: files, state dicts and the ledger do not hold it.

    Args:
        model: A quantized model.
        compute: ``"auto"`` uses kernels whose output has 50 dB or more against float64 with the same codes, or 10 dB
            more than the rounded weights have. ``"exact"`` dequantizes, and calls torch's operation in the dtype of the
            input. ``"int8"`` may also round inputs to int8 codes with one scale per row, and likewise weights of up to
            5 bits that are in groups or have levels. Schemes with int8 activations give the same numbers with all
            three.
        kernels: The kernels to choose from, the most preferred first; None stands for those of fewbits. The reference
            computes what they do not.

    Raises:
        ArgumentError: If `compute` or `kernels` is invalid, a kernel brings a weight layout that cannot be registered,
            or the model has no quantized layer.
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
    for kernel in kernels or ():
        if kernel.weight_layout is not WeightLayout:  # the reference reads every layout
            kernel.weight_layout.register()
    prepack(model, compute, kernels)


@torch.no_grad()
def prepack(
    model: nn.Module, compute: Compute, kernels: Sequence[Kernel[Any]] | None = None, *, reuse_memory: bool = False
) -> None:
    """Do the work of `set_compute`; `reuse_memory` allows it to overwrite the words of a new model."""
    for module in model.modules():
        if isinstance(module, PackedWeight):
            module.prepack(compute, kernels, reuse_memory=reuse_memory)
    trim()
