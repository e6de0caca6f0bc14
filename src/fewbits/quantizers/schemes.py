"""The schemes that come with the library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fewbits.numerics.spec import CastSpec, QuantSpec, Spec
from fewbits.quantizers.base import Quantizer
from fewbits.selection.info import TensorInfo


class Int8PerTensor(Quantizer):
    """8 bits a weight, one scale for a whole tensor. Prefer `Int8PerChannel`, which costs next to nothing more."""

    name = "int8-tensor"
    spec = QuantSpec(bits=8, granularity="tensor")


class Int8PerChannel(Quantizer):
    """8 bits a weight, one scale for every output channel (row)."""

    name = "int8"
    spec = QuantSpec(bits=8, granularity="channel")


class Int4Grouped(Quantizer):
    """4 bits a weight, one scale for every group of neighbouring inputs.

    A row that is no multiple of `group_size` has a shorter last group. Rows shorter than one group take per-channel
    int8, and the ledger says so. Embeddings and normalizations are kept unless asked for.

    Args:
        group_size: inputs in a group.
        symmetric: without a zero point.
        strategies: what every `Quantizer` takes.
    """

    name = "int4"
    default_skip = (
        nn.Embedding,
        nn.EmbeddingBag,
        nn.LayerNorm,
        nn.GroupNorm,
        nn.modules.batchnorm._NormBase,
    )
    _fallback = QuantSpec(bits=8, granularity="channel")

    def __init__(self, group_size: int = 128, *, symmetric: bool = True, **strategies: Any) -> None:
        self._spec = QuantSpec(bits=4, granularity="group", group_size=group_size, symmetric=symmetric)
        self.group_size = group_size
        super().__init__(**strategies)

    @property
    def spec(self) -> QuantSpec:
        """Four bits, grouped."""
        return self._spec

    def spec_for(self, info: TensorInfo) -> Spec:
        """Per-channel int8 for rows shorter than one group."""
        short = info.layout is not None and info.layout.columns < self.group_size
        return self._fallback if short else self.spec

    def reason_for(self, info: TensorInfo, spec: Spec) -> str | None:
        """Say why a tensor falls back."""
        if spec != self._fallback or info.layout is None:
            return super().reason_for(info, spec)
        return f"rows of {info.layout.columns} are shorter than one group of {self.group_size}"


class FP16Cast(Quantizer):
    """Half precision in store, the input's own dtype in arithmetic. A value beyond half's range is an error."""

    name = "fp16"
    spec = CastSpec(torch.float16)


#: The schemes by their short names.
SCHEMES: Mapping[str, type[Quantizer]] = {
    cls.name: cls for cls in (Int8PerTensor, Int8PerChannel, Int4Grouped, FP16Cast)
}
