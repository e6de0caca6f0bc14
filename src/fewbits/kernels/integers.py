"""Products of int8 inputs and integer codes: sums of whole numbers, exact, then scales.

What the reference computes, with the same bits, where a row has one scale.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from fewbits.kernels import features
from fewbits.kernels.base import Kernel
from fewbits.kernels.packed_mm import filled
from fewbits.kernels.weight_layouts import Int4Tiles, Int8Rows, WeightLayout
from fewbits.numerics.affine import dynamic_scale, encode_input

_F = TypeVar("_F", bound=WeightLayout)

#: So many products of two bytes, and of inputs and a zero point, are sure to fit int32.
MOST_INPUTS = (2**31 - 1) // (2 * 128 * 128)
#: So many products of two bytes add up to a whole number that float32 holds, in whatever order they are added.
EXACT_IN_FLOAT = 2**24 // (128 * 128)
#: Up to so many rows of inputs, turning the sums round takes less than laying out the weight.
FEW_ROWS = 64
#: Outputs whose groups are summed together: their sums stay in a cache.
OUTPUTS = 512
#: Elements of a block of weights that is summed at a time.
BLOCK = 1 << 20


class Integers(Kernel[_F]):
    """What all of them share: rounding the inputs, and the scales afterwards."""

    rounds_inputs = True

    def supports(self, weight: WeightLayout) -> str | None:
        """What the form can hold, if the sums fit."""
        reason: str | None = self.form.refuses(weight)
        if reason:
            return reason
        if weight.spec.granularity == "group" and self.form is Int8Rows:
            return "its sums are of whole rows, and it has groups"
        if weight.layout.columns > MOST_INPUTS:
            return f"sums of {weight.layout.columns} products may not fit int32"
        return None

    def takes(self, x: Tensor, rows: int) -> str | None:
        """Any input but float64, whose sums are rounded to float64."""
        return "inputs in float64 ask for float64 products" if x.dtype == torch.float64 else None


class IntMM(Integers[Int8Rows]):
    """``torch._int_mm``, where it is exact and the CPU has instructions for it."""

    name = "int_mm"
    form = Int8Rows

    def supports(self, weight: WeightLayout) -> str | None:
        """One scale a row, or one for all; zero points or none."""
        return super().supports(weight) or refuses_int_mm()

    def linear(self, x: Tensor, weight: Int8Rows) -> Tensor:
        """One integer product."""
        codes, x_scale = rounded(x, weight, weight.signed.shape[1])
        sums = sums_of_products(codes, weight.signed)
        if (zero_point := weight.params(slice(None)).zero_point) is not None:
            sums -= codes.sum(1, dtype=torch.int32, keepdim=True) * zero_point.flatten()
        return sums.float().mul_(x_scale).mul_(weight.row_scale)


class FloatSums(Integers[Int8Rows]):
    """Sums of whole numbers in float32, over as many inputs at a time as they are exact for."""

    name = "float_sums"
    form = Int8Rows

    def takes(self, x: Tensor, rows: int) -> str | None:
        """Not where torch may round the factors of a float product."""
        if torch.get_float32_matmul_precision() != "highest":
            return "torch may round float32 factors: set_float32_matmul_precision is not 'highest'"
        return super().takes(x, rows)

    def linear(self, x: Tensor, weight: Int8Rows) -> Tensor:
        """Blocks of rows, and within them blocks of inputs."""
        rows, wide = weight.signed.shape
        codes, x_scale = rounded(x, weight, wide)
        inputs, zero_point = codes.float(), weight.params(slice(None)).zero_point
        sums = codes.new_zeros((x.shape[0], rows), dtype=torch.int32)
        step = max(1, BLOCK // EXACT_IN_FLOAT)
        for start in range(0, rows, step):
            where = slice(start, min(start + step, rows))
            for first in range(0, wide, EXACT_IN_FLOAT):
                along = slice(first, first + EXACT_IN_FLOAT)
                sums[:, where] += torch.mm(inputs[:, along], weight.signed[where, along].float().t()).to(torch.int32)
        if zero_point is not None:
            sums -= codes.sum(1, dtype=torch.int32, keepdim=True) * zero_point.flatten()
        return sums.float().mul_(x_scale).mul_(weight.row_scale)


class GroupedIntMM(Integers[Int4Tiles]):
    """``torch._int_mm`` over one group of four-bit codes after the other; each sum is exact, then scaled and added."""

    name = "grouped_int_mm"
    form = Int4Tiles
    #: Below, the products of single groups are too small to pay.
    LEAST_ROWS = 128

    def supports(self, weight: WeightLayout) -> str | None:
        """What `Int4Tiles` can hold, symmetric."""
        if not weight.spec.symmetric:
            return "it has no zero points"
        if weight.spec.granularity != "group":
            return "it scales the sums of groups, and a row has one scale"
        return super().supports(weight) or refuses_int_mm()

    def takes(self, x: Tensor, rows: int) -> str | None:
        """Many rows, and no faster floats."""
        if features.has_bf16():
            return "products in bfloat16 are faster on this CPU"
        return f"{rows} rows are less than {self.LEAST_ROWS}" if rows < self.LEAST_ROWS else super().takes(x, rows)

    def linear(self, x: Tensor, weight: Int4Tiles) -> Tensor:
        """A few tiles at a time, and a group of theirs after the other."""
        tiles, group = weight.tiles, weight.group
        count, wide, half = tiles.shape
        codes, x_scale = rounded(x, weight, wide)
        parts = codes.view(x.shape[0], -1, group).transpose(0, 1).contiguous()
        scales = weight.of_groups(weight.scale)
        output = x_scale.new_zeros(x.shape[0], count * 2 * half)
        step = max(1, OUTPUTS // (2 * half))
        for first in range(0, count, step):
            where = slice(first, min(first + step, count))
            signed = (tiles[where] ^ 0x88).transpose(1, 2)
            steps = torch.stack([(signed << 4).view(torch.int8) >> 4, signed.view(torch.int8) >> 4], 1)
            steps = steps.reshape(-1, wide)
            columns = slice(first * 2 * half, where.stop * 2 * half)
            for index, part in enumerate(parts):
                sums = torch._int_mm(part, steps[:, index * group : (index + 1) * group].t())
                output[:, columns].addcmul_(sums, scales[index, columns])
        return output[:, : weight.layout.rows].mul_(x_scale)


def sums_of_products(codes: Tensor, signed: Tensor) -> Tensor:
    """Sums of products of int8 inputs, (rows, columns), and codes, (outputs, columns): int32, (rows, outputs)."""
    if codes.shape[1] == 1:  # of one column, torch's _int_mm leaves the output uninitialized
        return codes.int() * signed.t().int()
    if codes.shape[0] > FEW_ROWS:
        return torch._int_mm(codes, signed.t())
    # The second factor is laid out anew at every call: better the inputs than the weight.
    return torch._int_mm(signed, codes.t()).t().contiguous()


def refuses_int_mm() -> str | None:
    """Why integer products are no good here."""
    if not features.int_mm_is_exact():
        return features.INEXACT
    return None if features.has_vnni() else "_int_mm is slow on a CPU without VNNI"


def rounded(x: Tensor, weight: WeightLayout, columns: int) -> tuple[Tensor, Tensor]:
    """Inputs as int8 codes, filled up, and their scale in float32, (rows, 1); NaN where a row has no codes."""
    x = x.float()
    scale = dynamic_scale(x, (-1,)) if weight.input_scale is None else weight.input_scale
    codes = encode_input(x, scale)
    # NaN has no integer code: the scale carries it to the output.
    return filled(codes.to(torch.int8), columns), scale + codes.sum(1, keepdim=True) * 0
