"""What the forward of a quantized layer takes from its module: the bias, and the weight as a float tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fewbits.kernels.reference import check_floating
from fewbits.nn.stored import StoredWeight


def float_product(
    operation: Callable[[Tensor, Tensor, Tensor | None], Tensor], x: Tensor, stored: StoredWeight, bias: Tensor | None
) -> Tensor:
    """Compute a layer with the dequantized weight, in the dtype of `x`.

    Raises:
        ArgumentError: If `x` is not floating.
    """
    check_floating(x)
    return operation(x, stored.operand(x.dtype), None if bias is None else bias.to(x.dtype))


def bias_of(module: Any) -> Tensor | None:
    """Return the bias of a layer; None if it has none."""
    # Nearly always a parameter; `module.bias` costs as much as a small layer.
    held = module._parameters
    bias = held["bias"] if "bias" in held else module.bias  # noqa: SIM401, `get` would ask
    return bias if isinstance(bias, Tensor) else None
