"""Kernels for int8 inputs: they sum products of codes exactly, and multiply with the scales.

If a row has one scale, they give the same bits as the reference.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from fewbits.kernels import features
from fewbits.kernels.base import Kernel
from fewbits.kernels.digits import planes
from fewbits.kernels.int4_tiles import Int4Tiles
from fewbits.kernels.int8_rows import Int8Rows
from fewbits.kernels.packed_mm import padded
from fewbits.kernels.weight_layouts import WeightLayout, row_slices
from fewbits.numerics.affine import encode_input
from fewbits.numerics.scales import dynamic_scale

_F = TypeVar("_F", bound=WeightLayout)

#: The most products of two bytes, and of inputs and a zero point, whose sum always fits int32.
MOST_INPUTS = (2**31 - 1) // (2 * 128 * 128)
#: The most products of two bytes whose sum float32 holds exactly, in any order of addition.
EXACT_IN_FLOAT = 2**24 // (128 * 128)
#: The most rows of inputs for which transposing the sums costs less than transposing the weight.
FEW_ROWS = 64
#: The number of outputs whose groups are summed together, so that their sums stay in a cache.
OUTPUTS = 512
#: Elements of a block of weights in one product.
BLOCK = 1 << 20


class Integers(Kernel[_F]):
    """Kernels that round their inputs to int8."""

    rounds_inputs = True

    def supports(self, weight: WeightLayout) -> str | None:
        """Accept every weight that the layout can hold, if the sums fit int32."""
        if reason := super().supports(weight):
            return reason
        if weight.spec.granularity == "group" and self.weight_layout is Int8Rows:
            return "it sums whole rows, and the weight has groups"
        if weight.layout.columns > MOST_INPUTS:
            return f"sums of {weight.layout.columns} products may not fit int32"
        return None


class IntMM(Integers[Int8Rows]):
    """``torch._int_mm``, if it is exact and the CPU has instructions for it."""

    name = "int_mm"
    weight_layout = Int8Rows

    def supports(self, weight: WeightLayout) -> str | None:
        """Accept weights without groups, symmetric or not."""
        return super().supports(weight) or refuses_int_mm()

    def linear(self, x: Tensor, weight: Int8Rows) -> Tensor:
        """Compute one integer product, and scale it."""
        codes, x_scale = rounded(x, weight, weight.signed.shape[1])
        return scaled(sums_of_products(codes, weight.signed), codes, x_scale, weight)


class FloatSums(Integers[Int8Rows]):
    """Integer sums in float32; a block has so few inputs that its sums are exact."""

    name = "float_sums"
    weight_layout = Int8Rows

    def takes(self, x: Tensor, rows: int) -> str | None:
        """Refuse calls in which torch may round the factors of a float product."""
        if torch.get_float32_matmul_precision() != "highest":
            return "torch may round float32 factors: set_float32_matmul_precision is not 'highest'"
        return None

    def linear(self, x: Tensor, weight: Int8Rows) -> Tensor:
        """Multiply blocks of rows and inputs, and add up the sums as integers."""
        rows, wide = weight.signed.shape
        codes, x_scale = rounded(x, weight, wide)
        inputs, sums = codes.float(), codes.new_zeros((x.shape[0], rows), dtype=torch.int32)
        for where in row_slices(rows, BLOCK // EXACT_IN_FLOAT):
            for along in row_slices(wide, EXACT_IN_FLOAT):
                sums[:, where] += torch.mm(inputs[:, along], weight.signed[where, along].float().t()).to(torch.int32)
        return scaled(sums, codes, x_scale, weight)


class GroupedIntMM(Integers[Int4Tiles]):
    """``torch._int_mm`` for each group of four-bit codes: every sum is exact, then scaled and added."""

    name = "grouped_int_mm"
    weight_layout = Int4Tiles
    #: With fewer rows, the products of single groups are too small to be fast.
    LEAST_ROWS = 128

    def supports(self, weight: WeightLayout) -> str | None:
        """Accept symmetric weights in groups that `Int4Tiles` can hold."""
        if not weight.spec.symmetric:
            return "it takes no zero points"
        if weight.spec.granularity != "group":
            return "it scales the sums of groups, and the weight has no groups"
        if planes(weight.spec) > 1:
            return "it sums codes of at most 4 bits, without levels"
        return super().supports(weight) or refuses_int_mm()

    def takes(self, x: Tensor, rows: int) -> str | None:
        """Accept many rows, on CPUs without fast bfloat16 products."""
        if features.has_bf16():
            return "products in bfloat16 are faster on this CPU"
        return f"{rows} rows are less than {self.LEAST_ROWS}" if rows < self.LEAST_ROWS else None

    def linear(self, x: Tensor, weight: Int4Tiles) -> Tensor:
        """Multiply a few tiles at a time, group by group."""
        tiles, group = weight.tiles, weight.group
        count, wide, half = tiles.shape
        codes, x_scale = rounded(x, weight, wide)
        parts = codes.view(x.shape[0], -1, group).transpose(0, 1).contiguous()
        scales = weight.of_groups(weight.params(slice(None)).scale)
        output = x_scale.new_zeros(x.shape[0], count * 2 * half)
        for where in row_slices(count, max(1, OUTPUTS // (2 * half))):
            signed = (tiles[where] ^ 0x88).transpose(1, 2)
            centered = torch.stack([(signed << 4).view(torch.int8) >> 4, signed.view(torch.int8) >> 4], 1)
            centered = centered.reshape(-1, wide)
            columns = slice(where.start * 2 * half, where.stop * 2 * half)
            for index, part in enumerate(parts):
                sums = torch._int_mm(part, centered[:, index * group : (index + 1) * group].t())
                output[:, columns].addcmul_(sums, scales[index, columns])
        return output[:, : weight.layout.rows].mul_(x_scale)


def scaled(sums: Tensor, codes: Tensor, x_scale: Tensor, weight: Int8Rows) -> Tensor:
    """Subtract the zero points from sums of products, and multiply with the scales of inputs and weight."""
    if (zero_point := weight.params(slice(None)).zero_point) is not None:
        sums -= codes.sum(1, dtype=torch.int32, keepdim=True) * zero_point.flatten()
    return sums.float().mul_(x_scale).mul_(weight.row_scale)


def sums_of_products(codes: Tensor, signed: Tensor) -> Tensor:
    """Multiply int8 inputs, (rows, columns), with codes, (outputs, columns): int32, (rows, outputs)."""
    if codes.shape[1] == 1:  # of one column, torch's _int_mm leaves the output uninitialized
        return codes.int() * signed.t().int()
    if codes.shape[0] > FEW_ROWS:
        return torch._int_mm(codes, signed.t())
    # torch transposes the second factor at every call; the inputs are smaller than the weight.
    return torch._int_mm(signed, codes.t()).t().contiguous()


def refuses_int_mm() -> str | None:
    """Say why integer products are wrong or slow here; None if they are not."""
    if not features.int_mm_is_exact():
        return features.INEXACT
    return None if features.has_vnni() else "_int_mm is slow on a CPU without VNNI"


def rounded(x: Tensor, weight: WeightLayout, columns: int) -> tuple[Tensor, Tensor]:
    """Round inputs to padded int8 codes with float32 scales, (rows, 1); a row with NaN has the scale NaN."""
    x = x.float()
    scale = dynamic_scale(x, (-1,)) if weight.input_scale is None else weight.input_scale
    codes = encode_input(x, scale)
    # NaN has no integer code: the scale carries it to the output.
    return padded(codes.to(torch.int8), columns), scale + codes.sum(1, keepdim=True) * 0
