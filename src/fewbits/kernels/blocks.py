"""Kernels that dequantize and multiply a block of rows at a time.

A block fits a cache, and the whole float weight is never in memory. If the CPU has instructions for bfloat16, products
use them: bfloat16 holds 8-bit codes exactly, and the output has 50 dB against float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from fewbits.kernels import features
from fewbits.kernels.base import Kernel
from fewbits.kernels.int4_tiles import Int4Tiles
from fewbits.kernels.packed_mm import padded, suits_bf16
from fewbits.kernels.weight_layouts import Int8Rows, PackedInt32, WeightLayout

_F = TypeVar("_F", bound=WeightLayout)

#: Elements of a block: 4 MiB in bfloat16.
BLOCK = 1 << 21


class Blocks(Kernel[_F]):
    """Kernels for any number of rows, in any dtype but float64."""

    def takes(self, x: Tensor, rows: int) -> str | None:
        """Refuse float64 inputs."""
        return "inputs in float64 need float64 products" if x.dtype == torch.float64 else None


class ByteBlocks(Blocks[Int8Rows]):
    """Blocks of `Int8Rows`; a scale per row is multiplied in after the product."""

    name: ClassVar[str] = "byte_blocks"
    weight_layout = Int8Rows

    def supports(self, weight: WeightLayout) -> str | None:
        """Accept every weight that `Int8Rows` can hold."""
        return Int8Rows.refuses(weight)

    def linear(self, x: Tensor, weight: Int8Rows) -> Tensor:
        """Multiply block by block."""
        if weight.spec.granularity == "group":
            return decoded_blocks(x, weight)
        rows, wide = weight.signed.shape
        x = padded(x.to(product_dtype(weight)), wide)
        if weight.zero_point is None and weight.signed.numel() <= BLOCK:
            return torch.mm(x, weight.signed.to(x.dtype).t()) * weight.row_scale
        zero_point = weight.params(slice(None)).zero_point
        output, block = x.new_empty(x.shape[0], rows), x.new_empty(min(rows, block_step(wide)), wide)
        for where in row_slices(rows, len(block)):
            part = block[: where.stop - where.start].copy_(weight.signed[where])
            if zero_point is not None:
                part -= zero_point if zero_point.dim() == 1 else zero_point[where]
            torch.mm(x, part.t(), out=output[:, where])
        return output * weight.row_scale


class TileBlocks(Blocks[Int4Tiles]):
    """Blocks of `Int4Tiles`."""

    name: ClassVar[str] = "tile_blocks"
    weight_layout = Int4Tiles

    def supports(self, weight: WeightLayout) -> str | None:
        """Accept every weight that `Int4Tiles` can hold."""
        return Int4Tiles.refuses(weight)

    def linear(self, x: Tensor, weight: Int4Tiles) -> Tensor:
        """Multiply a few tiles at a time."""
        x = padded(x.to(product_dtype(weight)), weight.tiles.shape[1])
        output = self._rows_first(x, weight) if x.dtype == torch.bfloat16 else self._columns_first(x, weight)
        return output.view(x.shape[0], -1)[:, : weight.layout.rows]

    @staticmethod
    def _rows_first(x: Tensor, weight: Int4Tiles) -> Tensor:
        """Transpose each block, because bfloat16 products are faster on rows."""
        count, wide, half = weight.tiles.shape
        scales, zeros = _params(weight, x.dtype, (2, 3, 4, 0, 1))
        output = x.new_empty(x.shape[0], count * 2 * half)
        block = x.new_empty(min(count, block_step(wide * 2 * half)), 2, half, weight.table.shape[0], weight.group)
        for where in row_slices(count, len(block)):
            part = _expanded(weight.tiles[where].transpose(1, 2), scales, zeros, where, block)
            torch.mm(x, part.view(-1, wide).t(), out=output[:, where.start * 2 * half : where.stop * 2 * half])
        return output

    @staticmethod
    def _columns_first(x: Tensor, weight: Int4Tiles) -> Tensor:
        """Multiply each half tile in its own order."""
        count, wide, half = weight.tiles.shape
        scales, zeros = _params(weight, x.dtype, (2, 3, 0, 1, 4))
        output = x.new_empty(x.shape[0], count, 2, half)
        block = x.new_empty(min(count, block_step(wide * 4 * half)), 2, weight.table.shape[0], weight.group, half)
        for where in row_slices(count, len(block)):
            part = _expanded(weight.tiles[where], scales, zeros, where, block)
            product = torch.matmul(x, part.view(-1, wide, half))
            output[:, where] = product.view(-1, 2, x.shape[0], half).permute(2, 0, 1, 3)
        return output


class WordBlocks(Blocks[PackedInt32]):
    """Blocks of `PackedInt32`: codes of any width, with or without levels."""

    name: ClassVar[str] = "word_blocks"
    weight_layout = PackedInt32

    def supports(self, weight: WeightLayout) -> str | None:
        """Accept matrices on the CPU, except with float64 scales."""
        if weight.scale.device.type != "cpu":
            return f"the weight is on {weight.scale.device}, not on the CPU"
        if len(weight.layout.shape) != 2 or weight.layout.permutation != (0, 1) or not weight.layout.columns:
            return f"it is not a matrix of outputs by inputs, but of shape {weight.layout.shape}"
        return "it has float64 scales, which need float64 products" if weight.scale.dtype == torch.float64 else None

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


def row_slices(count: int, step: int) -> Iterator[slice]:
    """Cut `count` rows into slices of at most `step`."""
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


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
        tiles: uint8, in either order of its last two axes.
        scales: the scales of all tiles, from `_params`, in the same order.
        zeros: the zero points of all tiles, from `_params`; None for symmetric codes.
        where: the tiles among all tiles.
        block: (tiles, 2, ...); low and high halves of bytes lie apart.
    """
    part = block[: where.stop - where.start]
    # Signed bytes hold (code - 8) * 16, so neither half needs a shift to the right.
    signed = (tiles ^ 0x88).contiguous().view(part.shape[0], *part.shape[2:])
    part[:, 0].copy_((signed << 4).view(torch.int8))
    part[:, 1].copy_((signed & 0xF0).view(torch.int8))
    if zeros is not None:
        part -= zeros[where]
    return part.mul_(scales[where])
