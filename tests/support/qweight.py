"""Checkpoints of GPTQ and AWQ, written by hand from the definitions of the formats.

Nothing here is imported from fewbits, and codes are packed as large numbers or word by word.
"""

import json
from pathlib import Path
from typing import Any

import attrs
import safetensors.torch
import torch
from hypothesis import strategies as st
from torch import Tensor

from support.compressed import words

#: The output, of eight neighbours, whose code is at each place of a word of AWQ; the lowest four bits come first.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@attrs.frozen
class Layer:
    """A quantized Linear layer.

    Attributes:
        codes: unsigned, (outputs, inputs).
        zeros: unsigned, (outputs, groups).
        scales: float16, (outputs, groups).
        groups: the group of each input.
        bits: bits per code.
    """

    codes: Tensor
    zeros: Tensor
    scales: Tensor
    groups: Tensor
    bits: int

    def weight(self) -> Tensor:
        """The decoded weight in float32."""
        return (self.codes - self.zeros[:, self.groups]).float() * self.scales.float()[:, self.groups]

    def signed(self) -> Tensor:
        """The codes as fewbits has them."""
        return (self.codes - (1 << (self.bits - 1))).to(torch.int8)


@attrs.frozen
class Recipe:
    """How layers are quantized with GPTQ."""

    bits: int = 4
    group_size: int = 32  # -1: all inputs
    symmetric: bool = False
    version: str = "gptq"
    act_order: bool = False

    def settings(self, **changes: Any) -> dict[str, Any]:
        """The settings of such a checkpoint."""
        return {
            "quant_method": "gptq", "bits": self.bits, "group_size": self.group_size, "sym": self.symmetric,
            "desc_act": self.act_order, "checkpoint_format": self.version, "lm_head": False, "pack_dtype": "int32",
        } | changes  # fmt: skip


def recipes(**fixed: Any) -> st.SearchStrategy[Recipe]:
    """Every width, size of groups and version, with and without zero points."""
    choices = {
        "bits": st.sampled_from([2, 3, 4, 8]),
        "group_size": st.sampled_from([-1, 16, 32, 96, 128]),
        "symmetric": st.booleans(),
        "version": st.sampled_from(["gptq", "gptq_v2"]),
        "act_order": st.just(False),
    }
    return st.builds(Recipe, **choices | {name: st.just(value) for name, value in fixed.items()})


def layer(recipe: Recipe, outputs: int = 32, inputs: int = 96, seed: int = 0) -> Layer:
    """A layer with random codes, zero points and scales."""
    generator = torch.Generator().manual_seed(seed)
    width = inputs if recipe.group_size == -1 else recipe.group_size
    count, top = -(-inputs // width), 1 << recipe.bits
    # The first version cannot hold a zero point of 0.
    zeros = torch.randint(1 if recipe.version == "gptq" else 0, top, (outputs, count), generator=generator)
    groups = torch.arange(inputs) // width
    return Layer(
        codes=torch.randint(0, top, (outputs, inputs), generator=generator),
        zeros=torch.full_like(zeros, top // 2) if recipe.symmetric else zeros,
        scales=(torch.rand(outputs, count, generator=generator) * 0.02 + 0.001).half(),
        groups=groups[torch.randperm(inputs, generator=generator)] if recipe.act_order else groups,
        bits=recipe.bits,
    )


def gptq(prefix: str, layer: Layer, version: str = "gptq") -> dict[str, Tensor]:
    """The tensors of a layer in the format of GPTQ."""
    zeros = layer.zeros if version == "gptq_v2" else layer.zeros - 1
    return {
        f"{prefix}.qweight": _words(layer.codes, layer.bits).T,
        f"{prefix}.qzeros": _words(zeros.T, layer.bits),
        f"{prefix}.scales": layer.scales.T,
        f"{prefix}.g_idx": layer.groups.int(),
    }


def awq(prefix: str, layer: Layer) -> dict[str, Tensor]:
    """The tensors of a layer in the GEMM format of AWQ."""
    return {
        f"{prefix}.qweight": _interleaved(layer.codes.T),
        f"{prefix}.qzeros": _interleaved(layer.zeros.T),
        f"{prefix}.scales": layer.scales.T,
    }


def write(path: Path, tensors: dict[str, Tensor], settings: dict[str, Any] | None, **config: Any) -> Path:
    """A directory with one file of tensors, and a ``config.json`` if there are settings for it."""
    path.mkdir(exist_ok=True)
    safetensors.torch.save_file({name: t.contiguous() for name, t in tensors.items()}, path / "model.safetensors")
    (path / "config.json").unlink(missing_ok=True)
    if settings is not None:
        (path / "config.json").write_text(json.dumps({"model_type": "any", "quantization_config": settings} | config))
    return path


def _words(codes: Tensor, bits: int) -> Tensor:
    return torch.tensor([words(row, bits) for row in codes.tolist()], dtype=torch.int32)


def _interleaved(codes: Tensor) -> Tensor:
    packed = [
        [sum(row[start + output] << (4 * place) for place, output in enumerate(AWQ_ORDER)) for start in
         range(0, len(row), 8)]
        for row in codes.tolist()
    ]  # fmt: skip
    return torch.tensor(packed, dtype=torch.int64).to(torch.int32)
