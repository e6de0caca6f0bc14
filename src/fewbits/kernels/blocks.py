"""Kernels that dequantize and multiply a block of rows at a time.

A block fits a cache, and the whole float weight is never in memory. If the CPU has instructions for bfloat16, products
use them: bfloat16 holds 8-bit codes exactly, and the output has 50 dB against float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fewbits.kernels import features
from fewbits.kernels.base import Kernel
from fewbits.kernels.byte_pairs import BytePairs
from fewbits.kernels.int4_tiles import Int4Tiles
from fewbits.kernels.int8_rows import Int8Rows
from fewbits.kernels.packed_mm import padded, suits_bf16
from fewbits.kernels.weight_layouts import PackedInt32, WeightLayout, refuses_any, row_slices

#: Elements of a block: 4 MiB in bfloat16.
BLOCK = 1 << 21

#: With more rows, the cost of an operation of our own in a compiled graph does not matter.
TRACED_ROWS = 4096


class ByteBlocks(Kernel[Int8Rows]):
    """Blocks of `Int8Rows`; a scale per row is multiplied in after the product."""

    name = "byte_blocks"
    weight_layout = Int8Rows

    def linear(self, x: Tensor, weight: Int8Rows) -> Tensor:
        """Multiply block by block."""
        if weight.spec.granularity == "group":
            return decoded_blocks(x, weight)
        rows, wide = weight.signed.shape
        x = padded(x.to(product_dtype(weight)), wide)
        zero_point = weight.params(slice(None)).zero_point
        output, block = x.new_empty(x.shape[0], rows), x.new_empty(min(rows, block_step(wide)), wide)
        for where in row_slices(rows, len(block)):
            part = block[: where.stop - where.start].copy_(weight.signed[where])
            if zero_point is not None:
                part -= zero_point if zero_point.dim() == 1 else zero_point[where]
            torch.mm(x, part.t(), out=output[:, where])
        return output * weight.row_scale

    def traced(self, x: Tensor, weight: Int8Rows) -> Tensor:
        """Multiply with the only block."""
        x = padded(x.to(product_dtype(weight)), weight.signed.shape[1])
        zero_point, part = weight.params(slice(None)).zero_point, weight.signed.to(x.dtype)
        return torch.mm(x, (part if zero_point is None else part - zero_point).t()) * weight.row_scale

    def traced_rows(self, weight: Int8Rows) -> int:
        """Return a number for weights of one block; a graph would unroll the others."""
        is_block = weight.spec.granularity != "group" and weight.signed.numel() <= BLOCK
        return TRACED_ROWS if is_block else 0


class PairBlocks(Kernel[BytePairs]):
    """Blocks of `BytePairs`; a scale per row is multiplied in after the product."""

    name = "pair_blocks"
    weight_layout = BytePairs

    def linear(self, x: Tensor, weight: BytePairs) -> Tensor:
        """Multiply block by block."""
        rows, wide = weight.layout.rows, weight.wide
        x = padded(x.to(product_dtype(weight)), wide)
        output, block = x.new_empty(x.shape[0], rows), x.new_empty(min(rows, block_step(wide)), wide)
        high, low = weight.pairs.view(rows, 2, wide).unbind(1)
        for where in row_slices(rows, len(block)):
            numbers = high[where].to(torch.int16).mul_(256).add_(low[where].to(torch.int16))
            part = block[: where.stop - where.start].copy_(numbers)
            torch.mm(x, part.t(), out=output[:, where])
        return output * weight.row_scale


class TileBlocks(Kernel[Int4Tiles]):
    """Blocks of `Int4Tiles`."""

    name = "tile_blocks"
    weight_layout = Int4Tiles

    def linear(self, x: Tensor, weight: Int4Tiles) -> Tensor:
        """Multiply a few tiles at a time."""
        x = padded(x.to(product_dtype(weight)), weight.wide)
        output = x.new_empty(x.shape[0], weight.table.shape[1])
        for where, numbers in expanded_tiles(weight, x.dtype, weight.of_groups(weight.params(slice(None)).scale)):
            torch.mm(x, numbers.to(x.dtype), out=output[:, where])
        return output[:, : weight.layout.rows]


class WordBlocks(Kernel[PackedInt32]):
    """Blocks of `PackedInt32`: codes of any width, with or without levels."""

    name = "word_blocks"
    weight_layout = PackedInt32

    def supports(self, weight: WeightLayout) -> str | None:
        """Accept matrices on the CPU, except with float64 scales."""
        return refuses_any(weight, takes_levels=True)

    def linear(self, x: Tensor, weight: PackedInt32) -> Tensor:
        """Multiply block by block."""
        return decoded_blocks(x, weight)


def decoded_blocks(x: Tensor, weight: WeightLayout) -> Tensor:
    """Multiply with a weight in any layout; its own `decoded` decodes each block."""
    x = x.to(product_dtype(weight))
    rows, columns = weight.layout.matrix_shape
    output = x.new_empty(x.shape[0], rows)
    for where in row_slices(rows, block_step(columns)):
        torch.mm(x, weight.decoded(where).to(x.dtype).t(), out=output[:, where])
    return output


def product_dtype(weight: WeightLayout) -> torch.dtype:
    """Return the dtype in which blocks are multiplied."""
    exact = weight.spec.bits == 8 and not suits_bf16(weight)
    return torch.float32 if exact or not features.has_bf16() else torch.bfloat16


def block_step(elements: int) -> int:
    """Return how many rows of so many elements fit a block."""
    return max(1, BLOCK // elements)


def expanded_tiles(weight: Int4Tiles, dtype: torch.dtype, factors: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Decode a few tiles at a time.

    Args:
        weight: The weight.
        dtype: The dtype of the numbers. Sums of several digits would be rounded twice more in bfloat16; they have
            float32.
        factors: What multiplies the codes or levels, in place of the scales: float32, (groups, padded rows).

    Yields:
        Some padded rows, and their numbers, which the next ones overwrite: (padded columns, rows).
    """
    (count, _, half), group, zero_point = weight.tiles.shape, weight.group, weight.params(slice(None)).zero_point
    groups, dtype = weight.wide // group, dtype if weight.planes == 1 else torch.float32
    # Digits are read as numbers from -128 to 112, a sixteenth of the first digit's unit.
    unit = 16 if weight.units is None else 16 / float(weight.units[0])
    ratios = [1.0] if weight.units is None else (weight.units / weight.units[0]).tolist()

    def of_tiles(values: Tensor) -> Tensor:
        return values.to(dtype).view(groups, 1, count, 2, half)

    scales = of_tiles(factors / unit)
    zeros = None if zero_point is None else of_tiles(weight.of_groups(zero_point) * unit)
    digits = weight.tiles.view(count, -1, groups, group, half).permute(1, 2, 3, 0, 4)
    step = min(count, block_step(weight.wide * half * dtype.itemsize))
    blocks = weight.tiles.new_empty(min(weight.planes, 2), weight.wide * step * 2 * half, dtype=dtype)
    for where in row_slices(count, step):
        shape = groups, group, where.stop - where.start, 2, half
        part, other = (block[: math.prod(shape)].view(shape) for block in (blocks[0], blocks[-1]))
        _spread(digits[0, :, :, where], part)
        for plane, ratio in enumerate(ratios[1:], 1):
            part.add_(_spread(digits[plane, :, :, where], other), alpha=ratio)
        if zeros is not None:
            part -= zeros[:, :, where]
        part *= scales[:, :, where]
        yield slice(where.start * 2 * half, where.stop * 2 * half), part.view(weight.wide, -1)


def _spread(digits: Tensor, out: Tensor) -> Tensor:
    """Write both halves of bytes, (..., tiles, bytes), as digits times 16: (..., tiles, 2, bytes)."""
    # Signed bytes hold digits times 16, so neither half needs a shift to the right.
    signed = digits ^ 0x88
    out[..., 0, :].copy_((signed << 4).view(torch.int8))
    out[..., 1, :].copy_((signed & 0xF0).view(torch.int8))
    return out
