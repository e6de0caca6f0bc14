"""What the forward of a quantized layer takes from its module: the bias, and the weight as a float tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewbits.kernels.reference import check_floating


def float_product(
    operation: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    x: Tensor,
    decode: Callable[[torch.dtype], Tensor],
    bias: Tensor | None,
) -> Tensor:
    """Compute a layer with the dequantized weight, in the dtype of `x`.

    Args:
        operation: Takes input, weight and bias.
        x: The input.
        decode: Returns the weight in a dtype.
        bias: The bias, or None.

    Raises:
        ArgumentError: If `x` is not floating.
    """
    check_floating(x)
    if bias is not None and bias.dtype != x.dtype:  # a call of `to` takes time even if it does nothing
        bias = bias.to(x.dtype)
    return operation(x, decode(x.dtype), bias)


def bias_of(module: Any) -> Tensor | None:
    """Return the bias of a layer; None if it has none."""
    # Nearly always a parameter; `module.bias` costs as much as a small layer.
    held = module._parameters
    bias = held["bias"] if "bias" in held else module.bias  # noqa: SIM401, `get` would ask
    return bias if isinstance(bias, Tensor) else None
