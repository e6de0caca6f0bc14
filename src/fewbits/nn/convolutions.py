"""The quantized forms of convolutions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbits.kernels.base import PreparedWeight
from fewbits.kernels.convolution import (
    DOUBLES,
    FLOATS,
    PATCHES,
    convolved_in_bf16,
    is_pointwise,
    linear_over_places,
    refuses_bf16,
    refuses_linear,
    rows_are_outputs,
    sums_of_patches,
    way_of_sums,
)
from fewbits.kernels.onnx import is_exporting
from fewbits.kernels.reference import check_floating, integer_product
from fewbits.kernels.weight_layouts import WeightLayout
from fewbits.nn.base import QuantizedModule, form_of
from fewbits.nn.operands import bias_of, float_product
from fewbits.nn.packed import PackedWeight
from fewbits.nn.stored import StoredWeight
from fewbits.numerics.layout import Layout


class QuantizedConvolution(QuantizedModule):
    """A convolution of any kind: with float inputs, or exact sums of int8 inputs."""

    own_weight = "weight"
    rounds_inputs = True
    weight_stored: StoredWeight
    kernel_size: tuple[int, ...]

    @property
    def _stored(self) -> Any:
        # `self.weight_stored` takes longer than a small operation.
        return self._modules["weight_stored"]

    def stores(self) -> None:
        """Let kernels of linear layers compute with the weight, if they can."""
        super().stores()
        stored: Any = self.weight_stored
        own_forward = type(self).forward is form_of(type(self)).forward
        # Other kernels' layouts take longer to decode than words, which other inputs need.
        has_bytes = isinstance(stored, PackedWeight) and stored.spec.bits == 8 and stored.spec.levels is None
        is_matrix = has_bytes and rows_are_outputs(stored.layout) and is_pointwise(self)
        stored.is_pointwise |= own_forward and is_matrix and self._is_plain()
        stored.is_decoded = True

    def refuses_linear(self, input: Tensor) -> str | None:
        """Say why the kernels of linear layers do not compute this input; None if they do."""
        if not self._stored.is_pointwise or not is_pointwise(self) or not self._is_plain():
            return "it is no linear layer over the channels of each place"
        matrix = self.matrix
        return "none of them computes with its weight" if matrix is None else refuses_linear(self, matrix, input)

    def refuses_bf16(self, input: Tensor, weight: WeightLayout) -> str | None:
        """Say why the layer, whose weight has codes, does not compute in bfloat16; None if it does."""
        stored = self._stored
        if stored.offered is not None:
            return "set_compute has chosen other kernels"
        if reason := refuses_bf16(self, weight, input, stored.compute):
            return reason
        return None if self._is_plain() else f"{self.float_class.__name__} computes its convolution in its own way"

    @property
    def matrix(self) -> PreparedWeight | None:
        """The weight as a matrix, with the kernels that compute with it; None if only the reference does."""
        stored = self._stored
        return stored.part(slice(0, stored.layout.rows))  # type: ignore[no-any-return]

    def _is_plain(self) -> bool:
        """Whether no subclass of the float module has replaced a method that computes the convolution."""
        form, cls = form_of(type(self)), type(self)
        own = (name for name in form.forward_methods if name != "forward")
        return all(getattr(cls, name) is getattr(form.float_class, name) for name in own)

    def _convolved(self, input: Tensor, convolve: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Tensor:
        bias, stored = bias_of(self), self._stored
        if not isinstance(stored, PackedWeight):
            return float_product(convolve, input, stored.operand, bias)
        weight = stored.weight_layout()
        if stored.spec.activations is None:
            if torch.compiler.is_compiling():  # a compiler decodes the weight
                return float_product(convolve, input, weight.dequantize, bias)
            matrix = self.matrix if stored.is_pointwise and self.refuses_linear(input) is None else None
            if matrix is not None:
                return linear_over_places(self, matrix, input, bias)
            if self.refuses_bf16(input, weight) is None:
                return convolved_in_bf16(convolve, input, weight, bias)
            return float_product(convolve, input, weight.dequantize, bias)
        check_floating(input)
        if torch.compiler.is_compiling():
            way = FLOATS if is_exporting() else DOUBLES  # ONNX Runtime has no convolution in float64
        else:
            way = way_of_sums(self, weight, input, stored.compute)[0]
        # One scale per sample; an input without a batch axis is one sample.
        return integer_product(
            lambda x, floats: convolve(x, floats, None),
            input,
            weight,
            bias,
            spatial=len(self.kernel_size),
            sums=partial(sums_of_patches, module=self, weight=weight) if way == PATCHES else None,
            sum_dtype=torch.float32 if way == FLOATS else torch.float64,
        )


class _QuantizedConv(QuantizedConvolution):
    forward_methods = ("forward", "_conv_forward")
    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    @classmethod
    def declared_layout(cls, module: nn.Module, name: str, shape: tuple[int, ...]) -> Layout | None:
        """Outputs are the first axis."""
        return Layout.of(shape, inputs=range(1, len(shape))) if name == "weight" else None

    def forward(self, input: Tensor) -> Tensor:
        """Compute the float module's own convolution."""
        return self._convolved(input, self._conv_forward)


class QuantizedConv1d(_QuantizedConv, nn.Conv1d):
    """`torch.nn.Conv1d` with a stored weight of shape (out_channels, in_channels / groups, k)."""

    float_class = nn.Conv1d


class QuantizedConv2d(_QuantizedConv, nn.Conv2d):
    """`torch.nn.Conv2d` with a stored weight of shape (out_channels, in_channels / groups, k, k)."""

    float_class = nn.Conv2d


class QuantizedConv3d(_QuantizedConv, nn.Conv3d):
    """`torch.nn.Conv3d` with a stored weight of shape (out_channels, in_channels / groups, k, k, k)."""

    float_class = nn.Conv3d


_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class _QuantizedConvTranspose(QuantizedConvolution):
    forward_methods = ("forward", "_output_padding")
    _output_padding: Callable[..., list[int]]

    @classmethod
    def declared_layout(cls, module: Any, name: str, shape: tuple[int, ...]) -> Layout | None:
        """Outputs are the second axis; with groups, every output of every group is a row."""
        if name != "weight":
            return None
        if module.groups == 1:
            return Layout.of(shape, inputs=(0, *range(2, len(shape))))
        # (groups, inputs of a group, outputs of a group, kernel...)
        view = (module.groups, shape[0] // module.groups, *shape[1:])
        return Layout.of(shape, view=view, inputs=(1, *range(3, len(view))))

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Compute a transposed convolution."""
        size, stride, padding, dilation = self.kernel_size, self.stride, self.padding, self.dilation
        extra = self._output_padding(input, output_size, stride, padding, size, len(size), dilation)

        def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return _TRANSPOSED[len(size)](x, weight, bias, stride, padding, extra, self.groups, dilation)

        return self._convolved(input, convolve)


class QuantizedConvTranspose1d(_QuantizedConvTranspose, nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` with a stored weight of shape (in_channels, out_channels / groups, k)."""

    float_class = nn.ConvTranspose1d


class QuantizedConvTranspose2d(_QuantizedConvTranspose, nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` with a stored weight of shape (in_channels, out_channels / groups, k, k)."""

    float_class = nn.ConvTranspose2d


class QuantizedConvTranspose3d(_QuantizedConvTranspose, nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` with a stored weight of shape (in_channels, out_channels / groups, k, k, k)."""

    float_class = nn.ConvTranspose3d
