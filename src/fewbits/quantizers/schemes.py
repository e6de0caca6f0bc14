"""The built-in schemes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
from torch import nn

from fewbits.numerics.spec import SPECS, Activations
from fewbits.quantizers.base import Quantizer


class _Int8(Quantizer):
    """The base of both int8 schemes."""

    def __init__(self, activations: Activations | None = None, **strategies: Any) -> None:
        self.spec = attrs.evolve(type(self).spec, activations=activations)  # type: ignore[arg-type]
        super().__init__(**strategies)


class Int8PerTensor(_Int8):
    """8 bits per weight, one scale for each tensor. Prefer `Int8PerChannel`: it is more accurate and hardly larger.

    Args:
        activations: whether Linear layers and convolutions round their inputs to int8 too. ``"dynamic"``: one scale for
            each row (of a convolution: for each sample). ``"static"``: one scale for each layer, which `observe` finds.
            None: no rounding.
        strategies: the arguments of `Quantizer`.
    """

    name = "int8-tensor"
    spec = SPECS["int8-tensor"]


class Int8PerChannel(_Int8):
    """8 bits per weight, one scale for each output channel (row).

    Args:
        activations: whether Linear layers and convolutions round their inputs to int8 too. ``"dynamic"``: one scale for
            each row (of a convolution: for each sample). ``"static"``: one scale for each layer, which `observe` finds.
            None: no rounding.
        strategies: the arguments of `Quantizer`.
    """

    name = "int8"
    spec = SPECS["int8"]


class Int4Grouped(Quantizer):
    """4 bits per weight, one scale for each group of neighbouring inputs.

    Embeddings and normalizations are kept unless asked for.

    Args:
        group_size: inputs in a group.
        symmetric: without a zero point.
        scale_bits: None stores the scale of each group in `scale_dtype`; 2 to 8 stores a code of so many bits for each
            group, and one scale for each row; see `QuantSpec`.
        strategies: the arguments of `Quantizer`.
    """

    name = "int4"
    default_skip = (
        nn.Embedding,
        nn.EmbeddingBag,
        nn.LayerNorm,
        nn.GroupNorm,
        nn.modules.batchnorm._NormBase,
    )

    def __init__(
        self, group_size: int = 128, *, symmetric: bool = True, scale_bits: int | None = None, **strategies: Any
    ) -> None:
        fields: dict[str, Any] = {"group_size": group_size, "symmetric": symmetric, "scale_bits": scale_bits}
        self.spec = attrs.evolve(SPECS["int4"], **fields)
        super().__init__(**strategies)


class FP16Cast(Quantizer):
    """Weights stored in half precision; layers compute in the dtype of their input.

    Values beyond the range of float16 raise an error.
    """

    name = "fp16"
    spec = SPECS["fp16"]
    min_elements = 0  # a cast has no scales


#: The schemes by their short names.
SCHEMES: Mapping[str, type[Quantizer]] = {
    cls.name: cls for cls in (Int8PerTensor, Int8PerChannel, Int4Grouped, FP16Cast)
}
