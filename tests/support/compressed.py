"""Checkpoints as compressed-tensors lays them out, written by hand.

Nothing here is imported from fewbits, and a row of codes is packed as one large number.
"""

import json
import math
from pathlib import Path
from typing import Any

import attrs
import safetensors.torch
import torch
from hypothesis import strategies as st
from torch import Tensor


@attrs.frozen
class Recipe:
    """How weights are rounded to the nearest code, and stored."""

    bits: int = 4
    group_size: int | None = 8  # None: one scale per row; 0: one scale in all
    symmetric: bool = True
    packed: bool = True

    @property
    def strategy(self) -> str:
        return "group" if self.group_size else "channel" if self.group_size is None else "tensor"

    def weights(self) -> dict[str, Any]:
        """The entry of these weights in config.json."""
        return {
            "num_bits": self.bits, "type": "int", "symmetric": self.symmetric, "strategy": self.strategy,
            "group_size": self.group_size or None, "dynamic": False,
        }  # fmt: skip

    @property
    def format(self) -> str:
        return "pack-quantized" if self.packed else "int-quantized"


def recipes(**fixed: Any) -> st.SearchStrategy[Recipe]:
    """Every width, granularity, with and without zero points; divisors of 24 as group sizes."""
    choices = {
        "bits": st.integers(2, 8),
        "group_size": st.sampled_from([None, 0, 1, 4, 8, 24, 48]),
        "symmetric": st.booleans(),
        "packed": st.booleans(),
    }
    return st.builds(Recipe, **choices | {name: st.just(value) for name, value in fixed.items()})


def config(*recipes: Recipe, **changes: Any) -> dict[str, Any]:
    groups = {
        f"group_{index}": {"targets": ["Linear"], "format": recipe.format, "weights": recipe.weights()}
        for index, recipe in enumerate(recipes)
    }
    return {
        "quant_method": "compressed-tensors", "format": recipes[0].format, "quantization_status": "compressed",
        "config_groups": groups, "ignore": ["lm_head"],
    } | changes  # fmt: skip


def words(codes: list[int], bits: int) -> list[int]:
    """Unsigned codes in a stream of bits, the least significant first, as signed words of 32 bits."""
    stream = sum(code << (bits * index) for index, code in enumerate(codes))
    count = -(-len(codes) * bits // 32)
    return [((stream >> (32 * index)) + (1 << 31)) % (1 << 32) - (1 << 31) for index in range(count)]


def pack(codes: Tensor, bits: int) -> Tensor:
    """Signed codes, (rows, columns), in words."""
    unsigned = (codes.long() + (1 << (bits - 1))).tolist()
    return torch.tensor([words(row, bits) for row in unsigned], dtype=torch.int32)


def rounded(weight: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zero points of a (rows, columns) weight: (rows, columns), and twice (rows, groups)."""
    rows, columns = weight.shape
    low, high = -(1 << (recipe.bits - 1)), (1 << (recipe.bits - 1)) - 1
    width = math.prod(weight.shape) if recipe.group_size == 0 else recipe.group_size or columns
    groups = weight.float().reshape(-1, width)
    least, most = groups.amin(1, True).clamp(max=0), groups.amax(1, True).clamp(min=0)
    if recipe.symmetric:
        scale = torch.maximum(-least, most) / high
    else:
        scale = (most - least) / (high - low)
    scale = scale.clamp(min=1e-5).to(weight.dtype)
    zero = torch.zeros_like(scale) if recipe.symmetric else (low - least / scale.float()).round().clamp(low, high)
    codes = ((groups / scale.float()).round() + zero.float()).clamp(low, high)
    shape = (1, 1) if recipe.group_size == 0 else (rows, -1)
    return codes.reshape(rows, columns).to(torch.int8), scale.reshape(shape), zero.reshape(shape).to(torch.int8)


def stored(name: str, weight: Tensor, recipe: Recipe) -> dict[str, Tensor]:
    """The tensors of one weight."""
    codes, scale, zero = rounded(weight, recipe)
    if not recipe.packed:
        tensors = {name: codes, f"{name}_zero_point": zero}
    else:
        shape = torch.tensor(weight.shape)
        tensors = {f"{name}_packed": pack(codes, recipe.bits), f"{name}_shape": shape}
        tensors[f"{name}_zero_point"] = zero if recipe.group_size == 0 else pack(zero.T, recipe.bits).T.contiguous()
    if recipe.symmetric:
        del tensors[f"{name}_zero_point"]
    return tensors | {f"{name}_scale": scale.reshape(-1) if recipe.group_size == 0 else scale}


def quantized(source: dict[str, Tensor], recipe: Recipe, names: tuple[str, ...]) -> dict[str, Tensor]:
    """A whole result: these weights quantized, the other tensors unchanged."""
    tensors = {name: tensor for name, tensor in source.items() if name not in names}
    for name in names:
        tensors |= stored(name, source[name], recipe)
    return tensors


def write(path: Path, tensors: dict[str, Tensor], settings: dict[str, Any] | None = None) -> Path:
    """A directory with one file of tensors, and a config.json if there are settings for it."""
    path.mkdir(exist_ok=True)
    safetensors.torch.save_file({name: t.contiguous() for name, t in tensors.items()}, path / "model.safetensors")
    (path / "config.json").unlink(missing_ok=True)
    if settings is not None:
        (path / "config.json").write_text(json.dumps({"model_type": "any", "quantization_config": settings}))
    return path
