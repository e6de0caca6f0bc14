"""The quantized forms of classes that compute with a stored weight, or that need to declare something.

Each form of a torch class is a subclass of that class: ``isinstance`` and every option of the float module keep their
meaning. `fewbits.nn.swap` changes the class of a float module to its form.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fewbits.kernels.run import linear
from fewbits.nn.base import QuantizedModule, form_of
from fewbits.nn.operands import bias_of, float_product
from fewbits.nn.packed import PackedWeight
from fewbits.nn.stored import StoredWeight, stored_weights


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
            held = stored.traced() if torch.compiler.is_compiling() else stored.prepared()
            return linear(input, held, bias_of(self))
        return float_product(F.linear, input, stored.operand, bias_of(self))


class QuantizedEmbedding(QuantizedModule, nn.Embedding):
    """`torch.nn.Embedding` with a stored weight of shape (num_embeddings, embedding_dim)."""

    float_class = nn.Embedding
    own_weight = "weight"
    weight_stored: StoredWeight

    def stores(self) -> None:
        """Keep the weight in a layout whose rows are decoded fast."""
        super().stores()
        self.weight_stored.is_decoded = True

    def forward(self, input: Tensor) -> Tensor:
        """Look up rows: dequantize only those, or all of them under `max_norm`, which rescales in place."""
        if self.max_norm is not None:
            return super().forward(input)
        stored: Any = self._modules["weight_stored"]
        rows: Tensor = stored.dequantize_rows(input.reshape(-1), stored.dtype)
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
