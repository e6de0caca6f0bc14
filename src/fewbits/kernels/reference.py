"""The reference defines the output of a layer. Other kernels are measured against it.

Without int8 activations, a weight is dequantized to the input's dtype and used in the float operation. With them,
inputs are rounded to int8, integer products are summed exactly, and the sum is multiplied with both scales.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from fewbits.errors import ArgumentError
from fewbits.kernels.base import Kernel
from fewbits.kernels.weight_layouts import PackedInt32, WeightLayout
from fewbits.numerics.affine import clip_input, encode_input
from fewbits.numerics.dtypes import compute_dtype, dtype_name
from fewbits.numerics.scales import dynamic_scale

#: A linear operation: of an input and a weight, without bias.
Product = Callable[[Tensor, Tensor], Tensor]

#: Whether a transform of torch.func wraps a tensor. Such transforms do not know the operations of kernels.
is_wrapped: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor


class Reference(Kernel[WeightLayout]):
    """Dequantizes, or sums integers in float64; it computes with any weight, layout and input."""

    name = "reference"
    weight_layout = WeightLayout

    def __reduce__(self) -> str:
        """Pickle the only instance by its name."""
        return "REFERENCE"

    def prepack(self, weight: WeightLayout, *, reuse_memory: bool = False) -> WeightLayout:
        """Convert a weight to the canonical layout."""
        return PackedInt32.of(weight)

    def linear(self, x: Tensor, weight: WeightLayout) -> Tensor:
        """Return the product, without bias."""
        return linear(x, weight, None)


def linear(x: Tensor, weight: WeightLayout, bias: Tensor | None) -> Tensor:
    """Compute a linear layer: one `F.linear`, or an exact integer product.

    Raises:
        ArgumentError: If `x` is not floating.
    """
    check_floating(x)
    if weight.spec.activations is not None:
        return integer_product(F.linear, x, weight, bias)
    return F.linear(x, weight.dequantize(x.dtype), None if bias is None else bias.to(x.dtype))


def check_floating(x: Tensor) -> None:
    """Refuse integer inputs: the weight or the output would be cast to integers.

    Raises:
        ArgumentError: If `x` is not floating.
    """
    if not x.is_floating_point():
        raise ArgumentError(
            f"a quantized layer takes floating inputs, not {dtype_name(x.dtype)} of shape {tuple(x.shape)}; convert "
            "them first, for example with x.to(torch.float32)"
        )


def integer_product(
    product: Product,
    x: Tensor,
    weight: WeightLayout,
    bias: Tensor | None,
    *,
    spatial: int = 0,
    sums: Callable[[Tensor], Tensor] | None = None,
    sum_dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Round `x` to int8, multiply integers, and scale: ``(sum of q_x * (q_w - zero_point)) * s_x * s_w + bias``.

    The sum is exact: float64 holds integers up to 2**53. It is rounded to float32 (float64 for float64 inputs) and
    multiplied with the input's scale first. Gradients are those of the product with the dequantized weight.

    Args:
        product: The operation.
        x: The floating input.
        weight: A weight whose spec has int8 activations.
        bias: One number for each output channel, or None.
        spatial: How many spatial axes follow the channels in `x` and in the output. They and the channels of one sample
            share one dynamic scale.
        sums: A faster function from int8 codes to the same integers.
        sum_dtype: The dtype in which `product` sums integers; it must hold every sum.
    """
    wide, dtype = x.to(compute_dtype(x.dtype)), compute_dtype(x.dtype)

    def per_channel(values: Tensor) -> Tensor:
        return values.to(dtype).reshape(-1, *[1] * spatial)

    with torch.no_grad():
        still = wide.detach()  # forward mode ignores `no_grad`
        sample = tuple(range(-1 - spatial, 0))
        x_scale = dynamic_scale(still, sample) if weight.input_scale is None else weight.input_scale.to(dtype)
        codes = encode_input(still, x_scale)
        # NaN has no integer code: `product` carries it to the output. Transforms do not allow the check.
        if sums is None or is_transformed(x) or codes.sum().isnan():
            # Autocast does not touch float64; it would round sums in float32.
            with nullcontext() if sum_dtype == torch.float64 else torch.autocast("cpu", enabled=False):
                # A sum of negative zeros is -0.0 in floats; integer kernels give 0.
                summed = product(codes.to(sum_dtype), weight.centered_codes().to(sum_dtype)) + 0.0
        else:
            summed = sums(codes.to(torch.int8))
        output = summed.to(dtype) * x_scale * per_channel(weight.scale.flatten())
    if _has_slope(x):
        # Rounding has no slope: gradients pass through it, to the inputs that were not clipped.
        unclipped = wide if weight.input_scale is None else clip_input(wide, x_scale)
        smooth = product(unclipped, weight.dequantize(dtype))
        output = output + (smooth - smooth.detach())
    return (output if bias is None else output + per_channel(bias)).to(x.dtype)


def _has_slope(x: Tensor) -> bool:
    """Whether the output may be differentiated by `x`; under a transform, it is always assumed."""
    compiling = torch.compiler.is_compiling()
    return (torch.is_grad_enabled() and x.requires_grad) or (is_transforming() if compiling else is_transformed(x))


def is_transformed(x: Tensor) -> bool:
    """Whether a transform of torch.func wraps a tensor, or forward-mode differentiation is active."""
    return is_wrapped(x) or forward_ad._current_level >= 0


def is_transforming() -> bool:
    """Whether a compiler traces code under a transform of torch.func or forward-mode differentiation."""
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


# The effect of `torch.compiler.assume_constant_result`, which would import the compiler with every `import fewbits`.
is_transforming._dynamo_marked_constant = True  # type: ignore[attr-defined]

REFERENCE = Reference()
