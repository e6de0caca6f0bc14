"""The quantized forms of classes that compute with a stored weight, or that need to declare something.

Each form of a torch class is a subclass of that class: ``isinstance`` and every option of the float module keep their
meaning. `fewbits.nn.swap` changes the class of a float module to its form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fewbits.kernels.convolution import (
    DOUBLES,
    FLOATS,
    PATCHES,
    convolved_codes,
    refuses_codes,
    sums_of_patches,
    way_of_sums,
)
from fewbits.kernels.onnx import is_exporting
from fewbits.kernels.reference import check_floating, integer_product
from fewbits.kernels.run import linear
from fewbits.nn.base import QuantizedModule, form_of
from fewbits.nn.packed import PackedWeight
from fewbits.nn.stored import StoredWeight, stored_weights
from fewbits.numerics.layout import Layout


class QuantizedLinear(QuantizedModule, nn.Linear):
    """`torch.nn.Linear` with a stored weight of shape (out_features, in_features)."""

    float_class = nn.Linear
    own_weight = "weight"
    rounds_inputs = True
    weight_stored: StoredWeight

    def stores(self) -> None:
        """Let kernels compute with the weight, unless another forward reads it as a float tensor."""
        # Attention reads the weight of its output projection.
        is_replaced = type(self).forward is form_of(type(self)).forward
        computes = is_replaced and not isinstance(self, NonDynamicallyQuantizableLinear)
        self.weight_stored.computes |= computes
        self.weight_stored.is_read |= not computes

    def forward(self, input: Tensor) -> Tensor:
        """Compute the layer with the kernel that suits the input."""
        stored: Any = self._modules["weight_stored"]
        if isinstance(stored, PackedWeight):
            return linear(input, stored.prepared(), _bias(self))
        return _float_product(F.linear, input, stored, _bias(self))


class QuantizedConvolution(QuantizedModule):
    """A convolution of any kind: float, with codes or the dequantized weight, or exact, on int8 inputs."""

    own_weight = "weight"
    rounds_inputs = True
    weight_stored: StoredWeight
    kernel_size: tuple[int, ...]

    def refuses_codes(self, input: Tensor) -> str | None:
        """Say why the layer, whose weight has codes, dequantizes it for this input; None if it multiplies the codes."""
        stored: Any = self.weight_stored
        if stored.offered is not None:
            return "set_compute has chosen other kernels"
        return refuses_codes(self, stored.weight_layout(), input, stored.compute)

    def _convolved(self, input: Tensor, convolve: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Tensor:
        bias, stored = _bias(self), self.weight_stored
        if not isinstance(stored, PackedWeight):
            return _float_product(convolve, input, stored, bias)
        weight = stored.weight_layout()
        if stored.spec.activations is None:
            # A compiler decodes the weight.
            if torch.compiler.is_compiling() or self.refuses_codes(input) is not None:
                return _float_product(convolve, input, stored, bias)
            return convolved_codes(convolve, input, weight, bias)
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


class QuantizedEmbedding(QuantizedModule, nn.Embedding):
    """`torch.nn.Embedding` with a stored weight of shape (num_embeddings, embedding_dim)."""

    float_class = nn.Embedding
    own_weight = "weight"
    weight_stored: StoredWeight

    def forward(self, input: Tensor) -> Tensor:
        """Look up rows: dequantize only those, or all of them under `max_norm`, which rescales in place."""
        if self.max_norm is not None:
            return super().forward(input)
        rows = self.weight_stored.dequantize_rows(input.reshape(-1), self.weight_stored.dtype)
        return rows.reshape(*input.shape, self.embedding_dim)


class QuantizedEmbeddingBag(QuantizedModule, nn.EmbeddingBag):
    """`torch.nn.EmbeddingBag` with a stored weight of shape (num_embeddings, embedding_dim)."""

    float_class = nn.EmbeddingBag


class QuantizedMultiheadAttention(QuantizedModule, nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` with stored input projections; its fast path is taken as before."""

    float_class = nn.MultiheadAttention
    reads_weights_of_children = True

    def read_together(self) -> Iterable[StoredWeight]:
        """List the projections, with that of the output: its weight belongs to a child, and this forward reads it."""
        return [*super().read_together(), *stored_weights(self.out_proj).values()]


class QuantizedTransformerEncoderLayer(QuantizedModule, nn.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer`; its fast path reads the weights of its linear layers."""

    float_class = nn.TransformerEncoderLayer
    reads_weights_of_children = True


class QuantizedBilinear(QuantizedModule, nn.Bilinear):
    """`torch.nn.Bilinear` with a weight of shape (out_features, in1_features, in2_features)."""

    float_class = nn.Bilinear
    input_axes: ClassVar = {"weight": (1, 2)}


class QuantizedConv1D(QuantizedModule):
    """`Conv1D` of transformers: a linear layer with a weight of shape (inputs, outputs)."""

    input_axes: ClassVar = {"weight": (0,)}


class QuantizedLlama4Experts(QuantizedModule):
    """Fused experts of Llama 4, with weights of shape (experts, inputs, outputs)."""

    input_axes: ClassVar = {"gate_up_proj": (1,), "down_proj": (1,)}


QuantizedConv1D.register("transformers.pytorch_utils.Conv1D")
QuantizedLlama4Experts.register("transformers.models.llama4.modeling_llama4.Llama4TextExperts")


class QuantizedRNNBase(QuantizedModule, nn.RNNBase):
    """`torch.nn.LSTM`, `GRU` and `RNN`: the float module keeps a list of its parameters; this form rebuilds it."""

    float_class = nn.RNNBase
    rebuilt_attributes = frozenset({"_flat_weights"})

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights: object) -> None:
        """Ignore the list that torch sets in several places."""

    def stores(self) -> None:
        """Drop the list of float parameters."""
        super().stores()
        self.__dict__.pop("_flat_weights", None)
        self.__dict__["_flat_weight_refs"] = []

    def restored(self) -> None:
        """Build the list again."""
        nn.RNNBase._init_flat_weights(self)

    def _init_flat_weights(self) -> None:
        """Do nothing: there is no list to build."""

    def _update_flat_weights(self) -> None:
        """Do nothing: there is no list to update."""

    def flatten_parameters(self) -> None:
        """Do nothing: there is no float memory to make contiguous."""


def _float_product(
    operation: Callable[[Tensor, Tensor, Tensor | None], Tensor], x: Tensor, stored: StoredWeight, bias: Tensor | None
) -> Tensor:
    check_floating(x)
    return operation(x, stored.operand(x.dtype), None if bias is None else bias.to(x.dtype))


def _bias(module: Any) -> Tensor | None:
    # Nearly always a parameter; `module.bias` costs as much as a small layer.
    held = module._parameters
    bias = held["bias"] if "bias" in held else module.bias  # noqa: SIM401, `get` would ask
    return bias if isinstance(bias, Tensor) else None
