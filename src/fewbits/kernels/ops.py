"""``torch.ops.fewbits.linear``: one layer as one operation, for torch.compile and torch.export.

Which kernel runs is settled when it runs, by the number of rows then. The tensors are those of one form; what else
there is to know is in a string, so that an exported program carries it. A program that was exported on another kind of
CPU is right here too: where its form is not what this torch's kernels read, codes are decoded.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Sequence
from typing import Any, List  # noqa: UP035  (the schema of an operation: torch 2.6 knows no other list)

import attrs
import torch
from torch import Tensor

from fewbits.errors import ArgumentError
from fewbits.kernels.base import Compute, Kernel
from fewbits.kernels.choose import KERNELS, choose, kernels_reading
from fewbits.kernels.weight_layouts import WEIGHT_LAYOUTS, WeightLayout
from fewbits.numerics.affine import clip_input
from fewbits.numerics.layout import Layout
from fewbits.numerics.spec import QuantSpec, spec_from_dict

#: The kernels that this process knows: those of this library by name, others that it has used by name and number.
_known: dict[str, Kernel[Any]] = {kernel.name: kernel for kernel in KERNELS}


def _key(kernel: Kernel[Any]) -> str:
    """What a kernel is known by: two may have one name, and differ."""
    keys = (f"{kernel.name}#{number}" if number else kernel.name for number in itertools.count())
    return next(key for key in keys if _known.setdefault(key, kernel) is kernel)


def describe(weight: WeightLayout, compute: Compute, kernels: Sequence[Kernel[Any]]) -> str:
    """What the operation needs to know beside the tensors of a weight."""
    fields = {
        "form": weight.name,
        "tensors": list(weight.tensors()),
        "spec": weight.spec.to_dict(),
        "layout": weight.layout.to_dict(),
        "compute": compute,
        "kernels": [_key(kernel) for kernel in kernels],
    }
    return json.dumps(fields)


@attrs.frozen
class _Description:
    form: type[WeightLayout]
    names: tuple[str, ...]
    spec: QuantSpec
    layout: Layout
    compute: Compute
    kernels: tuple[Kernel[Any], ...]

    def weight(self, tensors: Sequence[Tensor]) -> WeightLayout:
        held: dict[str, Any] = {"zero_point": None, "input_scale": None}
        held.update(zip(self.names, tensors, strict=True))
        return self.form(**held, spec=self.spec, layout=self.layout)


@functools.lru_cache(maxsize=1024)
def _read(description: str) -> _Description:
    fields = json.loads(description)
    spec, layout = spec_from_dict(fields["spec"]), Layout(**fields["layout"])
    kernels = [_known[name] for name in fields["kernels"] if name in _known]
    if not isinstance(spec, QuantSpec):
        raise ArgumentError(f"only codes have a form, not {spec}")
    form, names = WEIGHT_LAYOUTS[fields["form"]], tuple(fields["tensors"])
    return _Description(form, names, spec, layout, fields["compute"], tuple(kernels))


@torch.library.custom_op("fewbits::linear", mutates_args=())
def linear(x: Tensor, tensors: List[Tensor], description: str) -> Tensor:  # noqa: UP006
    """``x @ weight.T`` in float32."""
    read = _read(description)
    weight = read.weight(tensors)
    with torch.autocast("cpu", enabled=False):
        return product(x, weight, kernels_reading(weight, read.compute, read.kernels))


def product(x: Tensor, weight: WeightLayout, kernels: Sequence[Kernel[Any]]) -> Tensor:
    """The same, called directly.

    Args:
        x: (..., inputs).
        weight: of (outputs, inputs).
        kernels: that compute with it, the most preferred first, and the reference last.
    """
    # Each line is paid at every call of a layer that may take no longer than ten of them.
    flat = x.dim() == 2
    rows = x if flat else x.reshape(-1, x.shape[-1])
    kernel = choose(kernels, rows, rows.shape[0])
    output = kernel.linear(rows, weight).float().contiguous()
    return output if flat else output.view(*x.shape[:-1], output.shape[1])


@linear.register_fake
def _(x: Tensor, tensors: List[Tensor], description: str) -> Tensor:  # noqa: UP006
    return x.new_empty(*x.shape[:-1], _read(description).layout.rows, dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, tensors, ctx.description = inputs
    ctx.save_for_backward(x, *tensors)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, list[None], None]:
    """That of the product with the dequantized weight; straight through the rounding of inputs."""
    x, *tensors = ctx.saved_tensors
    return torch.ops.fewbits.linear_gradient(grad, x, tensors, ctx.description), [None] * len(tensors), None


@torch.library.custom_op("fewbits::linear_gradient", mutates_args=())
def linear_gradient(grad: Tensor, x: Tensor, tensors: List[Tensor], description: str) -> Tensor:  # noqa: UP006
    """The gradient with respect to `x`."""
    weight = _read(description).weight(tensors)
    slope = torch.matmul(grad, weight.dequantize(grad.dtype)).to(x.dtype)
    return slope if weight.input_scale is None else slope * _unclipped(x, weight.input_scale)


@linear_gradient.register_fake
def _(grad: Tensor, x: Tensor, tensors: List[Tensor], description: str) -> Tensor:  # noqa: UP006
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _unclipped(x: Tensor, scale: Tensor) -> Tensor:
    return clip_input(x, scale) == x


def _keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, x, tensors, ctx.description = inputs
    ctx.save_for_backward(x, *tensors)


def _gradient_of_gradient(ctx: Any, slope: Tensor) -> tuple[Tensor, None, list[None], None]:
    """The gradient is linear in that of the output, and does not depend on `x`."""
    x, *tensors = ctx.saved_tensors
    weight = _read(ctx.description).weight(tensors)
    if weight.input_scale is not None:
        slope = slope * _unclipped(x, weight.input_scale)
    return torch.matmul(slope.float(), weight.dequantize(torch.float32).t()), None, [None] * len(tensors), None


linear.register_autograd(_gradient, setup_context=_keep)
linear_gradient.register_autograd(_gradient_of_gradient, setup_context=_keep_gradient)
