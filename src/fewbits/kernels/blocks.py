"""Kernels that dequantize and multiply a block of rows at a time.

A block fits a cache, and the whole float weight is never in memory. If the CPU has instructions for bfloat16, products
use them: bfloat16 holds 8-bit codes exactly, and the output has 50 dB against float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.kernels import features
from fewbits.kernels.base import Kernel
from fewbits.kernels.int4_tiles import Int4Tiles
from fewbits.kernels.packed_mm import padded, suits_bf16
from fewbits.kernels.weight_layouts import Int8Rows, PackedInt32, WeightLayout, refuses_any, row_slices

#: Elements of a block: 4 MiB in bfloat16.
BLOCK = 1 << 21


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


class TileBlocks(Kernel[Int4Tiles]):
    """Blocks of `Int4Tiles`."""

    name = "tile_blocks"
    weight_layout = Int4Tiles

    def linear(self, x: Tensor, weight: Int4Tiles) -> Tensor:
        """Multiply a few tiles at a time."""
        x = padded(x.to(product_dtype(weight)), weight.tiles.shape[1])
        (count, wide, half), groups, rows = weight.tiles.shape, weight.table.shape[0], x.shape[0]
        # Products in bfloat16 are faster on rows, so each block is transposed.
        rows_first = x.dtype == torch.bfloat16
        scales, zeros = _params(weight, x.dtype, (2, 3, 4, 0, 1) if rows_first else (2, 3, 0, 1, 4))
        shape = (half, groups, weight.group) if rows_first else (groups, weight.group, half)
        output = x.new_empty(rows, count, 2, half)
        block = x.new_empty(min(count, block_step(wide * half * x.itemsize)), 2, *shape)
        for where in row_slices(count, len(block)):
            tiles, out = weight.tiles[where], output[:, where]
            part = _expanded(tiles.transpose(1, 2) if rows_first else tiles, scales, zeros, where, block)
            if rows_first:
                torch.mm(x, part.view(-1, wide).t(), out=out.view(rows, -1))
            else:
                out.copy_(torch.matmul(x, part.view(-1, wide, half)).view(-1, 2, rows, half).permute(2, 0, 1, 3))
        return output.view(rows, -1)[:, : weight.layout.rows]


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


def _params(weight: Int4Tiles, dtype: torch.dtype, axes: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
    """Return scales and zero points for codes times 16: (groups, 1, tiles, 2, half a tile), permuted."""
    params = weight.params(slice(None))
    count, _, half = weight.tiles.shape

    def of_tiles(values: Tensor) -> Tensor:
        return weight.of_groups(values).to(dtype).view(-1, 1, count, 2, half).permute(axes).contiguous()

    zeros = None if params.zero_point is None else of_tiles(params.zero_point) * 16
    return of_tiles(params.scale) / 16, zeros


def _expanded(tiles: Tensor, scales: Tensor, zeros: Tensor | None, where: slice, block: Tensor) -> Tensor:
    """Decode some tiles into a block, and return the part of the block that holds them.

    Args:
        tiles: The tiles to decode: uint8, in either order of its last two axes.
        scales: The scales of all tiles, from `_params`, in the same order.
        zeros: The zero points of all tiles, from `_params`; None for symmetric codes.
        where: The place of these tiles among all tiles.
        block: Memory for the result: (tiles, 2, ...); low and high halves of bytes lie apart.
    """
    part = block[: where.stop - where.start]
    # Signed bytes hold (code - 8) * 16, so neither half needs a shift to the right.
    signed = (tiles ^ 0x88).contiguous().view(part.shape[0], *part.shape[2:])
    part[:, 0].copy_((signed << 4).view(torch.int8))
    part[:, 1].copy_((signed & 0xF0).view(torch.int8))
    if zeros is not None:
        part -= zeros[where]
    return part.mul_(scales[where])
