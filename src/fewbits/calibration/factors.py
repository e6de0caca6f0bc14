"""Multiply the scales of weights by factors that can be trained. The codes do not change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fewbits.calibration.changes import Change
from fewbits.kernels.weight_layouts import row_slices
from fewbits.nn.base import QuantizedModule, form_of
from fewbits.nn.packed import PackedWeight
from fewbits.nn.stored import StoredWeight
from fewbits.numerics.affine import clip_input, decode, encode_input
from fewbits.numerics.dtypes import compute_dtype
from fewbits.numerics.grid import grouped
from fewbits.numerics.layout import WeightMatrix, block_rows
from fewbits.numerics.params import QuantParams
from fewbits.numerics.parts import pack_params
from fewbits.numerics.scales import dynamic_scale, rescaled
from fewbits.numerics.spec import QuantSpec
from fewbits.numerics.tensor import QuantizedTensor, narrow


class ScaledWeight(StoredWeight):
    """Stands in for a packed weight. Its scales are multiplied by factors, then rounded to their stored dtype.

    The gradient of the logarithm of a factor is the sum of ``weight * gradient of the weight`` over the elements that
    the factor scales. Rounding counts as the identity.

    Attributes:
        original: the weight that it stands in for.
        by_row: logarithms of factors, one for each row: (rows, 1); (1,) if one scale serves the whole weight.
        by_scale: logarithms of factors, in the shape of the scales; None until they are tuned too.
    """

    original: PackedWeight
    spec: QuantSpec

    def __init__(self, original: PackedWeight, *, tuned: bool) -> None:
        super().__init__()
        object.__setattr__(self, "original", original)  # not a child: that would give the model one module more
        self.dtype, self.spec, self.layout = original.dtype, original.spec, original.layout
        self.training = original.training
        scale = original.weight_layout().params(slice(None)).scale
        shape = scale.shape if scale.dim() == 1 else (len(scale), 1)
        self.by_row = torch.zeros(shape, dtype=torch.float32, device=scale.device, requires_grad=tuned)
        self.by_scale: Tensor | None = None

    def tune_each_scale(self) -> Tensor | None:
        """Add a factor for each scale, and return their logarithms; None if the rows have one scale each."""
        shape = self._stored().scale.shape
        if self.by_scale is None and shape != self.by_row.shape:
            self.by_scale = torch.zeros(shape, dtype=torch.float32, device=self.by_row.device, requires_grad=True)
        return self.by_scale

    def params(self) -> QuantParams:
        """Return the zero points, and the scales times their factors, rounded to their stored dtype."""
        by_scale = torch.zeros(()) if self.by_scale is None else self.by_scale.detach()
        return rescaled(self._stored(), self.by_row.detach(), by_scale, self.spec)

    def change(self) -> Change | None:
        """Return the change of the packed weight; None if no scale has changed."""
        params, before = self.params(), self._stored()
        if torch.equal(params.scale, before.scale):
            return None
        rescale, spec = self.original.rescale, self.original.spec
        # The codes count as free: with other scales, other codes may be nearer.
        free = attrs.evolve(spec, rounding="free")
        return Change(self.original, partial(rescale, params, free), partial(rescale, before, spec))

    def value(self) -> QuantizedTensor:
        """Return the codes with the current scales."""
        return attrs.evolve(self.original.value(), **pack_params(self.params(), self.spec))

    def parts(self) -> dict[str, Tensor]:
        """Return the parts of the current value."""
        return {f"_{name}": part for name, part in self.value().parts().items()}

    def load_parts(self, parts: dict[str, Tensor], *, assign: bool) -> None:
        """Load other parts into the weight that this one stands in for."""
        self.original.load_parts(parts, assign=assign)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Decode the weight; gradients reach the factors."""
        by_scale = torch.zeros(()) if self.by_scale is None else self.by_scale
        decoded: Tensor = _Decoded.apply(self.by_row, by_scale, self, dtype or self.dtype)  # type: ignore[no-untyped-call]
        return decoded

    def dequantize_rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Return rows of a matrix; gradients reach the factors."""
        return self.dequantize(dtype).index_select(0, index)

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """Decode the weight a block of rows at a time, without gradients."""
        weight = self.original.weight_layout()
        params, wide = self.params(), compute_dtype(weight.scale.dtype)
        rows, columns = weight.layout.matrix_shape
        matrix = torch.empty(rows, columns, dtype=dtype, device=weight.scale.device)
        for where in row_slices(rows, block_rows(columns)):
            matrix[where] = narrow(decode(weight.codes(where), params.rows(where), self.spec, wide), dtype)
        return weight.layout.from_matrix(matrix)

    def slopes(self, products: Tensor) -> tuple[Tensor, Tensor | None]:
        """Sum the products of a weight and its gradient over rows, and over groups if these have factors."""
        sums = grouped(WeightMatrix(products, self.original.layout).whole(), self.spec).sum(2)
        by_row = sums.sum(1, keepdim=True) if self.by_row.dim() == 2 else sums.sum().reshape(1)
        return by_row, None if self.by_scale is None else sums

    def _stored(self) -> QuantParams:
        return self.original.weight_layout().params(slice(None))


class _Decoded(torch.autograd.Function):
    """Decodes a weight. The backward pass computes the gradients of the factors, and keeps none of the weight."""

    @staticmethod
    def forward(ctx: Any, by_row: Tensor, by_scale: Tensor, weight: ScaledWeight, dtype: torch.dtype) -> Tensor:
        decoded = weight.decoded(dtype)
        ctx.weight = weight
        ctx.save_for_backward(decoded)
        return decoded

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (decoded,), (grad,) = ctx.saved_tensors, grads
        return *ctx.weight.slopes(grad.float() * decoded.float()), None, None


def _rounds_inputs(module: nn.Module) -> bool:
    if not isinstance(module, QuantizedModule):
        return False
    return module.rounds_inputs and type(module).forward is form_of(type(module)).forward


def _rounding_inputs(module: Any, scale: Tensor | None) -> RemovableHandle:
    """Let a layer round its inputs to int8, as it does with codes; gradients pass to inputs that are not clipped."""
    axes = tuple(range(-1 - len(getattr(module, "kernel_size", ())), 0))

    def rounded(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = args[0] if args else kwargs["input"]
        wide = x.to(compute_dtype(x.dtype))
        with torch.no_grad():
            own = dynamic_scale(wide, axes) if scale is None else scale.to(wide.dtype)
            nearest = encode_input(wide, own) * own
        passed = wide if scale is None else clip_input(wide, own)
        x = (passed + (nearest - passed).detach()).to(x.dtype)
        return ((x, *args[1:]), kwargs) if args else (args, kwargs | {"input": x})

    handle: RemovableHandle = module.register_forward_pre_hook(rounded, with_kwargs=True)
    return handle


@contextmanager
def standing_in(model: nn.Module, *, tuned: bool) -> Iterator[list[ScaledWeight]]:
    """Let a `ScaledWeight` stand in for each packed weight of a model inside the block; tied weights have one.

    Args:
        model: the quantized model.
        tuned: whether gradients reach the factors.
    """
    places = [
        (module, name, child)
        for module in model.modules()
        for name, child in module._modules.items()
        if isinstance(child, PackedWeight)
    ]
    made = {original: ScaledWeight(original, tuned=tuned) for _, _, original in places}
    handles = [
        _rounding_inputs(module, original.weight_layout().input_scale)
        for module, _, original in places
        if original.spec.activations is not None and _rounds_inputs(module)
    ]
    try:
        for module, name, original in places:
            module._modules[name] = made[original]
        yield list(made.values())
    finally:
        for handle in handles:
            handle.remove()
        for module, name, original in places:
            module._modules[name] = original
