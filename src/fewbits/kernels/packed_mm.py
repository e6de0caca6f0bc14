"""Torch's own products with packed weights, for few rows: bound by how fast the codes can be read.

They are fast for bfloat16 inputs only, to which inputs are cast. The output reads 50 dB against float64, 10 dB more
than what rounding a weight to 8 bits leaves.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.kernels import features
from fewbits.kernels.base import Kernel
from fewbits.kernels.int4_tiles import Int4Tiles
from fewbits.kernels.weight_layouts import Int8Rows, WeightLayout


class Int8PackMM(Kernel[Int8Rows]):
    """``torch._weight_int8pack_mm``; scales are multiplied in afterwards, in float32."""

    name = "int8pack_mm"
    weight_layout = Int8Rows

    def supports(self, weight: WeightLayout) -> str | None:
        """Symmetric codes with one scale a row, or one for all."""
        if reason := Int8Rows.refuses(weight):
            return reason
        if weight.spec.granularity == "group":
            return "it has no scales for groups"
        if not weight.spec.symmetric:
            return "it has no zero points"
        if not suits_bf16(weight):
            rows, columns = weight.layout.matrix_shape
            return f"{rows} outputs of {columns} inputs are too few for 50 dB in bfloat16"
        return None if features.has_int8pack() else features.NO_BYTES

    def prepack(self, weight: WeightLayout, *, reuse_memory: bool = False) -> Int8Rows:
        """As bytes, and a vector of ones for so many outputs, which is made now and not in a forward."""
        _ones(weight.layout.rows)
        return super().prepack(weight, reuse_memory=reuse_memory)

    def takes(self, x: Tensor, rows: int) -> str | None:
        """A few rows."""
        return few_rows(x, rows, 12 if features.has_bf16() else 32)

    def linear(self, x: Tensor, weight: Int8Rows) -> Tensor:
        """One call, and one multiplication."""
        signed = weight.signed
        sums = torch._weight_int8pack_mm(filled(x.to(torch.bfloat16), signed.shape[1]), signed, _ones(signed.shape[0]))
        return sums * weight.row_scale


class Int4PackMM(Kernel[Int4Tiles]):
    """``torch.ops.aten._weight_int4pack_mm_for_cpu``."""

    name = "int4pack_mm"
    weight_layout = Int4Tiles

    def supports(self, weight: WeightLayout) -> str | None:
        """What `Int4Tiles` can hold, in tiles of this CPU: an exported program may have been made on another."""
        if isinstance(weight, Int4Tiles) and weight.width != features.tile_width():
            return f"its tiles of {weight.width} rows are those of another instruction set"
        return Int4Tiles.refuses(weight)

    def takes(self, x: Tensor, rows: int) -> str | None:
        """A few rows."""
        return few_rows(x, rows, 48)

    def linear(self, x: Tensor, weight: Int4Tiles) -> Tensor:
        """One call."""
        output: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            filled(x.to(torch.bfloat16), weight.tiles.shape[1]), weight.flat, weight.group, weight.table
        )
        return output[:, : weight.layout.rows]


#: Where there are fewer outputs or inputs, rounding them to bfloat16 leaves 50 dB on the average only.
FEW_OUTPUTS, FEW_INPUTS = 128, 64


def suits_bf16(weight: WeightLayout) -> bool:
    """Whether products of 8-bit codes, of a matrix, may be rounded to bfloat16; weights in groups would be too."""
    rows, columns = weight.layout.shape
    return rows >= FEW_OUTPUTS and columns >= FEW_INPUTS and weight.spec.granularity != "group"


def few_rows(x: Tensor, rows: int, most: int) -> str | None:
    """Why an input does not suit a kernel that is bound by the weight's bytes."""
    if x.dtype == torch.float64:
        return "inputs in float64 need float64 products"
    return f"{rows} rows are more than {most}" if rows > most else None


def filled(x: Tensor, columns: int) -> Tensor:
    """Rows filled up with zeros, and contiguous: torch's kernels do not look at strides."""
    return x.contiguous() if x.shape[1] == columns else F.pad(x, (0, columns - x.shape[1]))


@functools.lru_cache(maxsize=1024)
def _ones(outputs: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.ones(outputs, dtype=torch.bfloat16, device="cpu")
