"""`TensorInfo`: the facts about a tensor that selectors decide by."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Literal

import attrs
import torch

from fewbits.numerics.dtypes import FLOAT_DTYPES, dtype_name
from fewbits.numerics.layout import Layout

#: Name components that identify an embedding if its class is not known.
EMBEDDING_NAMES = frozenset(
    {
        "embedding", "embeddings", "embed", "embeds", "embed_tokens", "embed_positions", "tok_embeddings",
        "token_embedding", "word_embeddings", "position_embeddings", "position_embedding", "token_type_embeddings",
        "pos_embed", "relative_attention_bias", "shared", "wte", "wpe",
    }
)  # fmt: skip


@attrs.frozen
class TensorInfo:
    """One parameter or buffer of the source.

    Attributes:
        name: full dotted name, such as ``"encoder.layer.0.attention.self.query.weight"``.
        shape: the shape of the tensor.
        dtype: the dtype of the tensor in the source, or after it is dequantized on reading.
        kind: ``"parameter"``, ``"buffer"``, or ``"entry"`` (of a state dict or file, which do not tell them apart).
        owner: the class of the module that holds it; None if the source has no modules.
        storage: a key that two names share exactly if they are the same view of the same memory.
        layout: the layout that would cut the tensor into rows and columns; None if it cannot be quantized.
        declared: whether `layout` follows from the module's class; otherwise it is a guess by shape.
        obstacle: why no rule can make it quantized; None if it can be quantized.
        skip: why the scheme keeps it unless a rule names it; None if the scheme does not skip it.
        min_elements: the scheme keeps tensors with fewer elements unless a rule names them.
        persistent: whether the source's state dict has it.
        rounds_inputs: whether its layer can round its inputs to int8; True if the source has no modules.
        dequantized_from: the dtype of the codes, if the source holds codes with scales that are dequantized to `dtype`
            on reading; None otherwise.
        merged_into: if this tensor is the scale of one that is dequantized on reading, that tensor's name; None
            otherwise.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: Literal["parameter", "buffer", "entry"] = "entry"
    owner: type | None = None
    storage: Hashable = attrs.field(default=attrs.Factory(lambda self: self.name, takes_self=True))
    layout: Layout | None = None
    declared: bool = True
    obstacle: str | None = None
    skip: str | None = None
    min_elements: int = 0
    persistent: bool = True
    rounds_inputs: bool = True
    dequantized_from: torch.dtype | None = None
    merged_into: str | None = None

    @property
    def module(self) -> str:
        """The path of the module that holds the tensor; "" for the root."""
        return self.name.rpartition(".")[0]

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The size in the source, in bytes."""
        return self.elements * (self.dequantized_from or self.dtype).itemsize

    @property
    def is_embedding_by_name(self) -> bool:
        """Whether name and shape identify an embedding, for tensors whose class does not.

        An embedding is a matrix, or a table of positions of shape (1, n, d). If the owner is known, only the last part
        of the name counts: a model that uses a parameter as such a table names the parameter itself, as in
        ``pos_embed``.
        """
        is_table = len(self.shape) == 2 or (len(self.shape) == 3 and self.shape[0] == 1)
        parts = self.name.split(".")
        return is_table and not EMBEDDING_NAMES.isdisjoint(parts if self.owner is None else parts[-1:])


def numeric_obstacle(name: str, shape: Sequence[int], dtype: torch.dtype) -> str | None:
    """Say why a tensor of this name, shape and dtype can never be quantized; None if it can."""
    last = name.rpartition(".")[2]
    if not dtype.is_floating_point:
        return f"{dtype_name(dtype)} is not a floating dtype"
    if dtype not in FLOAT_DTYPES:
        return f"{dtype_name(dtype)} is a quantized dtype already"
    if last == "bias" or last.startswith("bias_") or last.endswith("_bias"):
        return "a bias is never quantized"
    if len(shape) < 2:
        return f"{len(shape)} dimension{'s' * (len(shape) != 1)}; two are needed"
    return None if math.prod(shape) else "it has no elements"


def layout_by_shape(shape: Sequence[int]) -> Layout:
    """Guess the layout of a tensor of at least two dimensions if its class is not known.

    A tensor of 3 to 5 dimensions whose last axis is shorter than 32 is taken for a convolution kernel: its first axis
    is the output, all others are inputs. In any other tensor, the last axis is the input.

    >>> layout_by_shape((64, 3, 7, 7)).matrix_shape, layout_by_shape((8, 64, 128)).matrix_shape
    ((64, 147), (512, 128))
    """
    if 3 <= len(shape) <= 5 and shape[-1] < 32:
        return Layout.of(shape, inputs=range(1, len(shape)))
    return Layout.of(shape)
