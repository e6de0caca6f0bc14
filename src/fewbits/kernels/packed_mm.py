"""Torch's own products with packed weights, for few rows: their speed depends on reading the codes.

They are fast for bfloat16 inputs only, so inputs are cast to it. The output has 50 dB against float64, 10 dB more than
a weight that is rounded to 8 bits.
"""

from __future__ import annotations

import functools
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.kernels import features
from fewbits.kernels.base import Kernel
from fewbits.kernels.byte_pairs import BytePairs
from fewbits.kernels.int4_tiles import Int4Tiles
from fewbits.kernels.int8_rows import Int8Rows
from fewbits.kernels.tracing import in_rows, is_traced, surely
from fewbits.kernels.weight_layouts import WeightLayout

#: The most rows that the kernel for integers takes of any small weight. It was faster than `byte_blocks` up to 40 rows
#: with a weight of 384x384, 20 with 576x576, and 18 with 1536x384.
MOST_ROWS_OF_SMALL = 32

#: The most products, rows times codes, with which it takes more rows than of a large weight.
MOST_PRODUCTS = 6_000_000

_B = TypeVar("_B", bound=WeightLayout)


class _Bytes(Kernel[_B]):
    """``torch._weight_int8pack_mm`` without scales; they are multiplied in afterwards, in float32."""

    def supports(self, weight: WeightLayout) -> str | None:
        """Accept weights that the layout can hold."""
        return super().supports(weight) or (None if features.has_int8pack() else features.NO_BYTES)

    def prepack(self, weight: WeightLayout, *, reuse_memory: bool = False) -> _B:
        """Convert a weight to bytes, and make the vector of ones that a forward needs."""
        _ones(weight.layout.rows)
        return super().prepack(weight, reuse_memory=reuse_memory)

    def takes(self, x: Tensor, rows: int, weight: _B) -> str | None:
        """Accept few rows."""
        return few_rows(rows, self.traced_rows(weight))

    def traced_rows(self, weight: _B) -> int:
        """Return the most rows that it takes."""
        return _most_rows_of_bytes()


class Int8PackMM(_Bytes[Int8Rows]):
    """The kernel for integers."""

    name = "int8pack_mm"
    weight_layout = Int8Rows

    def supports(self, weight: WeightLayout) -> str | None:
        """Accept symmetric codes without groups."""
        if reason := self.weight_layout.refuses(weight):
            return reason
        if weight.spec.granularity == "group":
            return "it takes no scales for groups"
        if not weight.spec.symmetric:
            return "it takes no zero points"
        if not suits_bf16(weight):
            rows, columns = weight.layout.matrix_shape
            return f"{rows} outputs of {columns} inputs are too few for 50 dB in bfloat16"
        return super().supports(weight)

    def traced_rows(self, weight: Int8Rows) -> int:
        """Return the most rows that it takes: more of a weight that lies in the caches."""
        return max(super().traced_rows(weight), min(MOST_ROWS_OF_SMALL, MOST_PRODUCTS // weight.signed.numel()))

    def linear(self, x: Tensor, weight: Int8Rows) -> Tensor:
        """Call torch, and multiply with the scales."""
        return _products(padded(x.to(torch.bfloat16), weight.signed.shape[1]), weight.signed) * weight.row_scale

    def traced(self, x: Tensor, weight: Int8Rows) -> Tensor:
        """Multiply one row in float32: inductor makes one loop of it, which reads each byte of the weight once.

        The loop reads memory twice as fast as torch's packed product.
        """
        if not surely(x.shape[0] == 1):
            return self.linear(x, weight)
        codes = weight.signed[:, : x.shape[1]]
        return ((codes.float() * in_rows(x.float())).sum(1) * weight.row_scale).view(1, -1)


class BytePairMM(_Bytes[BytePairs]):
    """The kernel for pairs of bytes; the low bytes multiply a 256th of the inputs."""

    name = "byte_pair_mm"
    weight_layout = BytePairs

    def linear(self, x: Tensor, weight: BytePairs) -> Tensor:
        """Call torch, and multiply with the scales."""
        x = padded(x.to(torch.bfloat16), weight.wide)
        return _products(torch.cat([x, x / 256], 1), weight.pairs) * (weight.row_scale * 256)


class Int4PackMM(Kernel[Int4Tiles]):
    """``torch.ops.aten._weight_int4pack_mm_for_cpu``; all digits of a code multiply the same input."""

    name = "int4pack_mm"
    weight_layout = Int4Tiles
    MOST_ROWS: ClassVar[int] = 48

    def supports(self, weight: WeightLayout) -> str | None:
        """Accept weights that `Int4Tiles` can hold, in tiles of this CPU; an exported program may have others."""
        if isinstance(weight, Int4Tiles) and weight.width != features.tile_width():
            return f"its tiles of {weight.width} rows are those of another instruction set"
        return super().supports(weight)

    def takes(self, x: Tensor, rows: int, weight: Int4Tiles) -> str | None:
        """Accept few rows."""
        return few_rows(rows, self.MOST_ROWS)

    def traced_rows(self, weight: Int4Tiles) -> int:
        """Return the most rows that it takes."""
        return self.MOST_ROWS

    def linear(self, x: Tensor, weight: Int4Tiles) -> Tensor:
        """Call torch."""
        x = padded(x.to(torch.bfloat16), weight.wide)
        output: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x if weight.planes == 1 else x.repeat(1, weight.planes),
            weight.flat,
            weight.group,
            weight.table.contiguous(),  # that of some rows of a larger weight has gaps
        )
        return output[:, : weight.layout.rows]


#: With fewer outputs or inputs, rounding them to bfloat16 leaves 50 dB on average, and less for some inputs.
FEW_OUTPUTS, FEW_INPUTS = 128, 64


def suits_bf16(weight: WeightLayout) -> bool:
    """Whether products of 8-bit codes may be rounded to bfloat16; in groups, the weights would be rounded too."""
    rows, columns = weight.layout.shape
    return rows >= FEW_OUTPUTS and columns >= FEW_INPUTS and weight.spec.granularity != "group"


def _most_rows_of_bytes() -> int:
    return 12 if features.has_bf16() else 32


def _products(x: Tensor, codes: Tensor) -> Tensor:
    """Multiply bfloat16 inputs, (rows, columns), with bytes, (outputs, columns): bfloat16, (rows, outputs)."""
    if not is_traced(x):
        return torch._weight_int8pack_mm(x, codes, _ones(codes.shape[0]))
    # Inductor fails if these scales are a constant, so it must compute them.
    ones = (codes[:, :1] == codes[:, :1]).to(x.dtype)
    return torch._weight_int8pack_mm(x, codes, in_rows(ones).view(-1))


def few_rows(rows: int, most: int) -> str | None:
    """Say why a kernel for few rows does not compute with so many rows; None if it does."""
    return f"{rows} rows are more than {most}" if rows > most else None


def padded(x: Tensor, columns: int) -> Tensor:
    """Pad rows with zeros and make them contiguous: torch's kernels ignore strides."""
    return in_rows(x if x.shape[1] == columns else F.pad(x, (0, columns - x.shape[1])))


@functools.cache
def _ones(outputs: int) -> Tensor:
    """Return ones for an operation that runs; a graph must not hold this tensor."""
    with torch.inference_mode(False):
        return torch.ones(outputs, dtype=torch.bfloat16, device="cpu")
