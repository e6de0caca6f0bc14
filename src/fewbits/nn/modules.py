"""The quantized forms of the classes of torch that compute with a stored weight in a way of their own.

Each is a subclass of the class it replaces, so that ``isinstance`` and every option of the float module keep their
meaning. `fewbits.nn.swap` turns a float module into one of these, or into a class made of one of these and the float
module's own class; they are not constructed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fewbits.kernels.convolution import FLOATS, PATCHES, sums_of_patches, way_of_sums
from fewbits.kernels.reference import check_floating, integer_product, rounds_inputs
from fewbits.kernels.run import linear
from fewbits.nn.base import QuantizedModule, reading_once, stored_weights
from fewbits.nn.stored import PackedWeight, StoredWeight


class QuantizedLinear(QuantizedModule, nn.Linear):
    """`torch.nn.Linear` with a stored weight of shape (out_features, in_features)."""

    float_class = nn.Linear
    weight_stored: StoredWeight

    def stores(self) -> None:
        """Tell the weight whether it is computed with; attention reads that of its output projection."""
        if type(self).forward is QuantizedLinear.forward and not isinstance(self, NonDynamicallyQuantizableLinear):
            self.weight_stored.computes = True

    def forward(self, input: Tensor) -> Tensor:
        """What `fewbits.kernels.run` says a linear layer is."""
        return linear(input, self._modules["weight_stored"], _bias(self))  # type: ignore[arg-type]


class QuantizedConvolution(QuantizedModule):
    """A convolution of any kind: float, with the dequantized weight, or exact, on int8 inputs."""

    weight_stored: StoredWeight
    kernel_size: tuple[int, ...]

    def _convolved(self, input: Tensor, convolve: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Tensor:
        spatial, bias, stored = len(self.kernel_size), _bias(self), self.weight_stored
        check_floating(input)
        if not rounds_inputs(stored):
            weight = stored.operand(input.dtype)
            return convolve(input, weight, None if bias is None else bias.to(input.dtype))
        sums, sum_dtype = None, torch.float64
        if isinstance(stored, PackedWeight) and not torch.compiler.is_compiling():
            form = stored.form()
            way, _ = way_of_sums(self, form, input, stored.compute)
            if way == PATCHES:
                sums = partial(sums_of_patches, module=self, weight=form)
            elif way == FLOATS:
                sum_dtype = torch.float32
        # One scale per sample; an input without a batch axis is one sample.
        return integer_product(
            lambda x, weight: convolve(x, weight, None),
            input,
            stored,
            bias,
            spatial=spatial,
            sums=sums,
            sum_dtype=sum_dtype,
        )


class _QuantizedConv(QuantizedConvolution):
    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def forward(self, input: Tensor) -> Tensor:
        """The float module's own convolution."""
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


class _QuantizedConvTranspose(QuantizedConvolution):
    _convolve: ClassVar[Callable[..., Tensor]]
    _output_padding: Callable[..., list[int]]

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """One transposed convolution."""
        size, stride, padding, dilation = self.kernel_size, self.stride, self.padding, self.dilation
        extra = self._output_padding(input, output_size, stride, padding, size, len(size), dilation)

        def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return type(self)._convolve(x, weight, bias, stride, padding, extra, self.groups, dilation)

        return self._convolved(input, convolve)


class QuantizedConvTranspose1d(_QuantizedConvTranspose, nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` with a stored weight of shape (in_channels, out_channels / groups, k)."""

    float_class = nn.ConvTranspose1d
    _convolve = staticmethod(F.conv_transpose1d)


class QuantizedConvTranspose2d(_QuantizedConvTranspose, nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` with a stored weight of shape (in_channels, out_channels / groups, k, k)."""

    float_class = nn.ConvTranspose2d
    _convolve = staticmethod(F.conv_transpose2d)


class QuantizedConvTranspose3d(_QuantizedConvTranspose, nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` with a stored weight of shape (in_channels, out_channels / groups, k, k, k)."""

    float_class = nn.ConvTranspose3d
    _convolve = staticmethod(F.conv_transpose3d)


class QuantizedEmbedding(QuantizedModule, nn.Embedding):
    """`torch.nn.Embedding` with a stored weight of shape (num_embeddings, embedding_dim)."""

    float_class = nn.Embedding
    weight_stored: StoredWeight

    def forward(self, input: Tensor) -> Tensor:
        """Dequantize the rows that are asked for (all of them under `max_norm`, which rescales in place)."""
        if self.max_norm is None:
            rows = self.weight_stored.dequantize_rows(input.reshape(-1), self.weight_stored.dtype)
            return rows.reshape(*input.shape, self.embedding_dim)
        weight = self.weight_stored.dequantize()
        return F.embedding(input, weight, self.padding_idx, self.max_norm, self.norm_type)


class QuantizedEmbeddingBag(QuantizedModule, nn.EmbeddingBag):
    """`torch.nn.EmbeddingBag` with a stored weight of shape (num_embeddings, embedding_dim)."""

    float_class = nn.EmbeddingBag
    weight_stored: StoredWeight

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Dequantize, then one `F.embedding_bag` (which under `max_norm` rescales rows in place)."""
        stored = self.weight_stored
        weight = stored.operand(stored.dtype) if self.max_norm is None else stored.dequantize()
        return F.embedding_bag(
            input,
            weight,
            offsets,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.mode,
            self.sparse,
            per_sample_weights,
            self.include_last_offset,
            self.padding_idx,
        )


class QuantizedMultiheadAttention(QuantizedModule, nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` with stored input projections; its fast path is taken as before."""

    float_class = nn.MultiheadAttention
    forward = reading_once(nn.MultiheadAttention.forward)

    def read_together(self) -> Iterable[StoredWeight]:
        """The projections, that of the output included, which is a module of its own and read from here."""
        return [*super().read_together(), *stored_weights(self.out_proj).values()]


class QuantizedRNNBase(QuantizedModule, nn.RNNBase):
    """`torch.nn.LSTM`, `GRU` and `RNN` keep a list of their parameters, which is made anew at every reading here."""

    float_class = nn.RNNBase

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights: object) -> None:
        """Torch sets its list in several places; there is none to be kept."""

    def stores(self) -> None:
        """Let go of the list of float parameters."""
        self.__dict__.pop("_flat_weights", None)
        self.__dict__["_flat_weight_refs"] = []

    def restored(self) -> None:
        """Make the list again."""
        nn.RNNBase._init_flat_weights(self)

    def _init_flat_weights(self) -> None:
        """There is no list to be made."""

    def _update_flat_weights(self) -> None:
        """There is no list to be out of date."""

    def flatten_parameters(self) -> None:
        """There is no float memory to be made contiguous."""


def _bias(module: Any) -> Tensor | None:
    # Where it nearly always is; to ask the module costs as much as a small layer.
    held = module._parameters
    bias = held["bias"] if "bias" in held else module.bias  # noqa: SIM401, `get` would ask
    return bias if isinstance(bias, Tensor) else None


#: The classes that compute with a weight of their own kind; of other classes any parameter is read as a float tensor.
OWN_CLASSES: tuple[type[QuantizedModule], ...] = (
    QuantizedLinear,
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConv3d,
    QuantizedConvTranspose1d,
    QuantizedConvTranspose2d,
    QuantizedConvTranspose3d,
    QuantizedEmbedding,
    QuantizedEmbeddingBag,
)
#: The classes whose parameters, of any name, need more than being read.
CAREFUL_CLASSES: tuple[type[QuantizedModule], ...] = (QuantizedMultiheadAttention, QuantizedRNNBase)
