"""Kernels for int8 inputs: they sum products of codes exactly, and multiply with the scales.

For integers with one scale for a row, they give the same bits as the reference. `TileIntMM` rounds other weights to
int8 first.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from fewbits.kernels import features
from fewbits.kernels.base import Kernel
from fewbits.kernels.blocks import TRACED_ROWS, expanded_tiles
from fewbits.kernels.int4_tiles import Int4Tiles
from fewbits.kernels.int8_rows import Int8Rows
from fewbits.kernels.packed_mm import padded
from fewbits.kernels.tracing import surely
from fewbits.kernels.weight_layouts import WeightLayout, row_slices
from fewbits.numerics.affine import encode_input
from fewbits.numerics.scales import dynamic_scale
from fewbits.numerics.spec import QuantSpec

_F = TypeVar("_F", bound=WeightLayout)

#: The most products of two bytes, and of inputs and a zero point, whose sum always fits int32.
MOST_INPUTS = (2**31 - 1) // (2 * 128 * 128)
#: The most products of two bytes whose sum float32 holds exactly, in any order of addition.
EXACT_IN_FLOAT = 2**24 // (128 * 128)
#: The most rows of inputs for which transposing the sums costs less than transposing the weight.
FEW_ROWS = 64
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

    def traced_rows(self, weight: Int8Rows) -> int:
        """Return a large number: a compiler fuses the rounding of inputs and the scales with what surrounds them."""
        return TRACED_ROWS

    def linear(self, x: Tensor, weight: Int8Rows) -> Tensor:
        """Compute one integer product, and scale it."""
        codes, x_scale = rounded(x, weight, weight.signed.shape[1])
        return scaled(sums_of_products(codes, weight.signed), codes, x_scale, weight)


class FloatSums(Integers[Int8Rows]):
    """Integer sums in float32; a block has so few inputs that its sums are exact."""

    name = "float_sums"
    weight_layout = Int8Rows

    def takes(self, x: Tensor, rows: int, weight: Int8Rows) -> str | None:
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


class TileIntMM(Integers[Int4Tiles]):
    """``torch._int_mm`` with blocks of tiles, expanded to int8 codes with one scale for each row."""

    name = "tile_int_mm"
    weight_layout = Int4Tiles
    rounds_weights = True
    #: The widest codes, with several scales for a row or with levels, that int8 codes with one scale may replace.
    MOST_BITS = 5

    def supports(self, weight: WeightLayout) -> str | None:
        """Accept weights that `Int4Tiles` can hold; in groups or with levels, codes of few bits."""
        if not _has_steps(weight.spec) and weight.spec.bits > self.MOST_BITS:
            return f"codes of {weight.spec.bits} bits in groups or with levels are too fine for int8 codes of a row"
        return super().supports(weight) or refuses_int_mm()

    def linear(self, x: Tensor, weight: Int4Tiles) -> Tensor:
        """Multiply a few tiles at a time."""
        factors, steps = _factors(weight)
        codes, x_scale = rounded(x, weight, weight.wide)
        output = x_scale.new_empty(x.shape[0], len(steps))
        for where, numbers in expanded_tiles(weight, torch.float32, factors):
            output[:, where] = torch._int_mm(codes, numbers.round_().to(torch.int8))
        return output.mul_(x_scale).mul_(steps)[:, : weight.layout.rows]


def _has_steps(spec: QuantSpec) -> bool:
    """Whether codes are integers with one scale for a row or for the tensor."""
    return spec.granularity != "group" and spec.levels is None


def _factors(weight: Int4Tiles) -> tuple[Tensor, Tensor]:
    """Return what multiplies codes or levels to give int8 codes, and the scales of those.

    Integers with one scale for a row stay as they are. Otherwise 127 is the largest magnitude that the row can have.

    Returns:
        float32, (groups, padded rows) and (padded rows,).
    """
    spec, params = weight.spec, weight.params(slice(None))
    scale = weight.of_groups(params.scale)
    if _has_steps(spec):
        return torch.ones_like(scale), scale[0]
    reach: float | Tensor = -spec.code_min
    if params.zero_point is not None:
        reach = weight.of_groups(torch.maximum(params.zero_point - spec.code_min, spec.code_max - params.zero_point))
    elif weight.nibbles is not None and weight.units is not None:
        # Of the digits, which may exceed that of the levels; codes without a level do not count.
        used = weight.nibbles[:, : spec.code_max - spec.code_min + 1]
        reach = ((used.float() - 8).t() @ weight.units).abs().amax()
    # Rows of padding have scales of zero.
    steps = (scale * (reach / 127)).abs().amax(0).clamp(min=torch.finfo(torch.float32).tiny)
    return scale / steps, steps


def scaled(sums: Tensor, codes: Tensor, x_scale: Tensor, weight: Int8Rows) -> Tensor:
    """Subtract the zero points from sums of products, and multiply with the scales of inputs and weight."""
    if (zero_point := weight.params(slice(None)).zero_point) is not None:
        sums -= codes.sum(1, dtype=torch.int32, keepdim=True) * zero_point.flatten()
    return sums.float().mul_(x_scale).mul_(weight.row_scale)


def sums_of_products(codes: Tensor, signed: Tensor) -> Tensor:
    """Multiply int8 inputs, (rows, columns), with codes, (outputs, columns): int32, (rows, outputs)."""
    if codes.shape[1] == 1:  # of one column, torch's _int_mm leaves the output uninitialized
        return codes.int() * signed.t().int()
    if surely(codes.shape[0] > FEW_ROWS):
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
    static = weight.input_scale
    scale = dynamic_scale(x, (-1,)) if static is None else static
    codes = encode_input(x, scale)
    # NaN has no integer code, so the scale carries it to the output. A dynamic scale is NaN or infinite if an input is;
    # times 0, both are NaN. A static scale gets the NaN of the codes.
    marked = scale * 0 if static is None else codes.sum(1, keepdim=True) * 0
    return padded(codes.to(torch.int8), columns), scale + marked
