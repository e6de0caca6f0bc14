"""``torch.ops.fewbits.linear``: one layer as one operation, for torch.export, gradients and torch.compile.

For torch.compile it has a twin, ``compiled_linear``, which AOTAutograd takes apart into the operations of a kernel.
The number of rows at run time decides which kernel runs. The arguments are the tensors of one weight layout, and a
string with everything else, which an exported program carries. A program that was exported on another CPU gives right
results too: if no kernel here reads its layout, the codes are decoded.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any, List  # noqa: UP035  (the schema of an operation: torch 2.6 knows no other list)
from urllib.parse import quote, unquote

import attrs
import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode

from fewbits._version import __version__
from fewbits.errors import ArgumentError
from fewbits.kernels import features
from fewbits.kernels.base import Compute, Kernel
from fewbits.kernels.choose import KERNELS, choose, kernels_reading
from fewbits.kernels.tracing import surely
from fewbits.kernels.weight_layouts import WEIGHT_LAYOUTS, WeightLayout
from fewbits.numerics.affine import clip_input
from fewbits.numerics.layout import Layout
from fewbits.numerics.spec import spec_from_dict

#: The kernels that this process knows: kernels of this library by name, other kernels by name and number.
_known: dict[str, Kernel[Any]] = {kernel.name: kernel for kernel in KERNELS}


#: Characters that `describe` leaves unquoted.
_UNQUOTED = " {}[]:,#"


def _key(kernel: Kernel[Any]) -> str:
    # Two different kernels may have one name.
    keys = (f"{kernel.name}#{number}" if number else kernel.name for number in itertools.count())
    return next(key for key in keys if _known.setdefault(key, kernel) is kernel)


def _origin(kernel: Kernel[Any]) -> str:
    return f"{type(kernel).__module__}.{type(kernel).__qualname__}"


def describe(weight: WeightLayout, compute: Compute, kernels: Sequence[Kernel[Any]]) -> str:
    """Return the string argument of the operation: everything but the tensors of a weight.

    It is JSON with ``%22`` for each quotation mark: inductor writes the string into C++ unchanged.
    """
    fields = {
        "weight_layout": weight.name,
        "tensors": list(weight.tensors()),
        "spec": weight.spec.to_dict(),
        "layout": weight.layout.to_dict(),
        "compute": compute,
        "kernels": [_key(kernel) for kernel in kernels],
        # torch keeps compiled graphs on disk by this text: it must tell everything that decides what a kernel traces.
        "traced_by": [__version__, *map(_origin, kernels), *features.found()],
    }
    return quote(json.dumps(fields), safe=_UNQUOTED)


@attrs.frozen
class _Description:
    """A description, parsed.

    Attributes:
        make: Makes the weight from the tensors in `tensors`, which are keyword arguments.
        tensors: The names of the tensors, in order.
        layout: How the weight is cut into rows and columns.
        compute: How the layer may gain speed.
        kernels: The kernels to choose from.
    """

    make: Callable[..., WeightLayout]
    tensors: Sequence[str]
    layout: Layout
    compute: Compute
    kernels: Sequence[Kernel[Any]]

    def weight(self, tensors: Sequence[Tensor]) -> WeightLayout:
        """Return the weight in its layout."""
        return self.make(**dict(zip(self.tensors, tensors, strict=True)))


@functools.lru_cache(maxsize=1024)
def _read(description: str) -> _Description:
    fields = json.loads(unquote(description))
    weight_layout = WEIGHT_LAYOUTS.get(fields["weight_layout"])
    if weight_layout is None:
        raise ArgumentError(
            f"this program holds a weight in the layout {fields['weight_layout']!r}, which this process does not know; "
            "import the package that defines the layout, and call its register()"
        )
    fields["spec"], layout = spec_from_dict(fields["spec"]), Layout(**fields["layout"])
    make = functools.partial(weight_layout, spec=fields["spec"], layout=layout)
    kernels = [_known[name] for name in fields["kernels"] if name in _known]
    return _Description(make, fields["tensors"], layout, fields["compute"], kernels)


@torch.library.custom_op("fewbits::linear", mutates_args=())
def linear(x: Tensor, tensors: List[Tensor], description: str) -> Tensor:  # noqa: UP006
    """Return ``x @ weight.T`` in float32."""
    read = _read(description)
    _check_columns(x, read.layout)
    weight = read.weight(tensors)
    with torch.autocast("cpu", enabled=False):
        return product(x, weight, kernels_reading(weight, read.compute, read.kernels))


def product(x: Tensor, weight: WeightLayout, kernels: Sequence[Kernel[Any]]) -> Tensor:
    """Return ``x @ weight.T`` in float32, without the overhead of an operation.

    Args:
        x: The inputs: (..., inputs).
        weight: The weight, (outputs, inputs).
        kernels: The kernels that compute with the weight, the most preferred first, and the reference last.
    """
    # Each line costs time at every call; a small layer takes as long as ten such lines.
    flat = x.dim() == 2
    rows = x if flat else x.reshape(-1, x.shape[-1])
    kernel = choose(kernels, rows, rows.shape[0], weight)
    output = kernel.linear(rows, weight).float().contiguous()
    return output if flat else output.view(*x.shape[:-1], output.shape[1])


@linear.register_fake
def _fake(x: Tensor, tensors: List[Tensor], description: str) -> Tensor:  # noqa: UP006
    layout = _read(description).layout
    _check_columns(x, layout)
    return x.new_empty(*x.shape[:-1], layout.rows, dtype=torch.float32)


def _check_columns(x: Tensor, layout: Layout) -> None:
    torch._check(  # type: ignore[no-untyped-call]
        x.shape[-1] == layout.columns,
        lambda: f"the input has shape {tuple(x.shape)}, and the layer takes rows of {layout.columns}",
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, tensors, ctx.description = inputs
    ctx.save_for_backward(x, *tensors)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, list[None], None]:
    """Return the gradient of the product with the dequantized weight; rounding of inputs counts as the identity."""
    x, *tensors = ctx.saved_tensors
    return torch.ops.fewbits.linear_gradient(grad, x, tensors, ctx.description), [None] * len(tensors), None


@torch.library.custom_op("fewbits::linear_gradient", mutates_args=())
def linear_gradient(grad: Tensor, x: Tensor, tensors: List[Tensor], description: str) -> Tensor:  # noqa: UP006
    """Return the gradient with respect to `x`."""
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
    """Return the second gradient: the first is linear in that of the output, and does not depend on `x`."""
    x, *tensors = ctx.saved_tensors
    weight = _read(ctx.description).weight(tensors)
    if weight.input_scale is not None:
        slope = slope * _unclipped(x, weight.input_scale)
    return torch.matmul(slope.float(), weight.dequantize(torch.float32).t()), None, [None] * len(tensors), None


@torch.library.custom_op("fewbits::compiled_linear", mutates_args=())
def compiled_linear(x: Tensor, tensors: List[Tensor], description: str) -> Tensor:  # noqa: UP006
    """Return what `linear` returns: the operation that torch.compile sees, and that it may take apart."""
    return torch.ops.fewbits.linear(x, tensors, description)  # type: ignore[no-any-return]


@compiled_linear.register_torch_dispatch(FunctionalTensorMode)
def _(mode: Any, operation: Any, types: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    """Trace the operations of a kernel in place of the operation, for few rows; AOTAutograd calls this."""
    x, tensors, description = args
    read = _read(description)
    with mode:
        weight = read.weight(tensors)
        kernel = _traced(x, weight, kernels_reading(weight, read.compute, read.kernels))
        if kernel is not None:
            output = kernel.traced(x.reshape(-1, x.shape[-1]), weight).float().contiguous()
            return output.view(*x.shape[:-1], read.layout.rows)
    return mode.__torch_dispatch__(torch.ops.fewbits.linear.default, types, args, kwargs)


def _traced(x: Tensor, weight: WeightLayout, kernels: Sequence[Kernel[Any]]) -> Kernel[Any] | None:
    """Return the kernel whose operations a compiler sees; None if it sees one operation.

    A number of rows that changes is not compared, since each comparison would become a guard and multiply the graphs.
    """
    rows = x.numel() // x.shape[-1]
    for kernel in kernels if surely(rows > 0) else ():
        most = kernel.traced_rows(weight)
        if most and surely(rows <= most):
            return kernel
        # The operation chooses at run time, unless this kernel refuses every such input.
        if not most or not surely(rows > most) or kernel.takes(x, rows, weight) is None:
            return None
    return None


linear.register_autograd(_gradient, setup_context=_keep)
compiled_linear.register_fake(_fake)
compiled_linear.register_autograd(_gradient, setup_context=_keep)
linear_gradient.register_autograd(_gradient_of_gradient, setup_context=_keep_gradient)
