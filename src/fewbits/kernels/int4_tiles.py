"""`Int4Tiles`: codes as four-bit digits, in the order in which torch's kernel for four bits reads them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.kernels import features
from fewbits.kernels.digits import digits_of, planes
from fewbits.kernels.weight_layouts import (
    PackedInt32,
    Rows,
    WeightLayout,
    looked_up,
    refuses_any,
    reused_memory,
    round_up,
    row_slices,
    taken,
)
from fewbits.numerics.layout import block_rows
from fewbits.numerics.spec import QuantSpec

#: The groups that ``_weight_int4pack_mm_for_cpu`` knows, the widest first.
TABLE_GROUPS = (256, 128, 64, 32)

#: How many of the usual blocks are converted at a time: 4-bit codes are small, and calls have a cost.
_BLOCKS_AT_ONCE = 8


@attrs.define(eq=False, kw_only=True)
class Int4Tiles(WeightLayout):
    """Four-bit digits of codes, in the order of torch's ``_weight_int4pack_mm_for_cpu``.

    A code of at most 4 bits is one digit. Wider codes, and indices of levels, are sums of two or more digits in units
    of their own (see `fewbits.kernels.digits`). Each digit has a plane of columns, and the planes lie side by side, as
    if the weight had more inputs.

    A tile holds the codes of `width` rows, column after column: the low halves of its bytes are the first ``width / 2``
    rows, the high halves the others. The width depends on the instruction set. Rows are padded to whole tiles, and
    columns to whole groups of the table, with digits of zero.

    Attributes:
        tiles: Digits plus 8: uint8, (tiles, planes * padded columns, width / 2).
        table: Scales, and the values of digit 0: bfloat16, (planes * groups, padded rows, 2).
        nibbles: The digits plus 8 of all codes: uint8, (planes, codes); None for one plane.
        units: The value of a digit of each plane: float32, (planes,); None for one plane.
        flat: The tiles in the shape that torch's kernel takes: (padded rows, padded columns / 2).
        group: How many columns share an entry of the table.
    """

    name = "int4_tiles"
    data = ("tiles", "table", "nibbles", "units")

    tiles: Tensor
    table: Tensor
    nibbles: Tensor | None = None
    units: Tensor | None = None
    flat: Tensor = attrs.field(init=False)
    group: int = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        # Kept, because a layer needs them at every call.
        count, long, half = self.tiles.shape
        self.flat, self.group = self.tiles.view(count * half * 2, long // 2), long // self.table.shape[0]

    @property
    def width(self) -> int:
        """The number of rows in a tile."""
        return 2 * self.tiles.shape[2]

    @property
    def planes(self) -> int:
        """The number of digits in a code."""
        return 1 if self.units is None else len(self.units)

    @property
    def wide(self) -> int:
        """The number of padded columns in a plane."""
        return self.tiles.shape[1] // self.planes

    @classmethod
    def refuses(cls, weight: WeightLayout) -> str | None:
        """Say why this layout cannot hold a weight: it takes groups that torch's kernel knows."""
        spec, (rows, columns) = weight.spec, weight.layout.matrix_shape
        if reason := refuses_any(weight, takes_levels=True):
            return reason
        if spec.bits == 8 and spec.levels is None:
            return "two digits in bfloat16 are too coarse for integers of 8 bits"
        if spec.width(columns) % min(TABLE_GROUPS) and spec.groups(columns) > 1:
            return f"groups of {spec.group_size}, not a multiple of {min(TABLE_GROUPS)}"
        width, group = features.tile_width(), table_group(spec, columns)
        if width is None:
            return features.NO_TILES
        if round_up(rows, width) * round_up(columns, group) > 2 * rows * columns:
            return f"padded to whole tiles, {rows} rows of {columns} would take more than twice the memory"
        return None

    @classmethod
    def of(cls, weight: WeightLayout, *, reuse_memory: bool = False) -> Int4Tiles:
        """Convert a weight to tiles, and its scales to a table."""
        rows, columns = weight.layout.matrix_shape
        group, width = table_group(weight.spec, columns), features.tile_width() or max(features.WIDTHS)
        count, tall, wide = planes(weight.spec), round_up(rows, width) // width, round_up(columns, group)
        # The tensors that stay are allocated before temporary ones, so that no holes remain between layers.
        tiles = reused_memory(weight, reuse_memory, tall, count * wide, width // 2)
        table = tiles.new_zeros((count * wide // group, tall * width, 2), dtype=torch.bfloat16)
        made = cls(tiles=tiles, table=table, **_digits(weight), **weight.shared())
        made._fill_table()
        for where in row_slices(tall, _BLOCKS_AT_ONCE * max(1, block_rows(wide) // width)):
            made._fill_tiles(weight, where)
        return made

    def _fill_table(self) -> None:
        params, count = self.params(slice(None)), self.planes
        table = self.table.view(count, -1, *self.table.shape[1:])
        for plane, unit in zip(table, [1.0] if self.units is None else self.units.tolist(), strict=True):
            spread(params.scale.float() * unit, self, self.group, plane[..., 0])
        if params.zero_point is not None:
            spread(-params.zero_point * params.scale.float(), self, self.group, table[0, ..., 1])

    def _fill_tiles(self, weight: WeightLayout, where: slice) -> None:
        tiles = self.tiles[where]
        planes = tiles.view(len(tiles), self.planes, self.wide // 2, 2, -1).unbind(1)
        for plane, (even, odd) in zip(planes, self._bytes(weight, where), strict=True):
            _transpose(even, plane[:, :, 0])
            _transpose(odd, plane[:, :, 1])

    def _bytes(self, weight: WeightLayout, where: slice) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the bytes of some tiles before they are transposed, even columns and odd columns, for each plane.

        Yields:
            Two tensors of uint8, (tiles, width / 2, columns / 2); low halves of bytes are the first half of a tile's
            rows.
        """
        rows, (half, wide) = slice(where.start * self.width, where.stop * self.width), (self.width // 2, self.wide)
        fits = weight.layout.columns == wide and rows.stop <= weight.layout.rows
        if isinstance(weight, PackedInt32) and weight.spec.bits == 4 and self.nibbles is None and fits:
            # A byte of the words holds an even column and the next odd one.
            pairs = weight.packed[rows].contiguous().view(-1).view(torch.uint8)
            low, high = pairs.view(-1, 2, half, wide // 2).unbind(1)
            yield low & 15 | high << 4, low >> 4 | high & 0xF0
            return
        codes = weight.codes(rows)
        padding = 0, wide - codes.shape[1], 0, rows.stop - rows.start - codes.shape[0]
        for nibbles in [codes + self._offset] if self.nibbles is None else (looked_up(n, codes) for n in self.nibbles):
            low, high = F.pad(nibbles, padding, value=8).reshape(-1, 2, half, wide).unbind(1)
            both = low | high << 4
            yield both[..., ::2], both[..., 1::2]

    @property
    def _offset(self) -> int:
        """The nibble of unsigned code 0, if there is one plane."""
        return 8 + self.spec.code_min

    def of_groups(self, params: Tensor) -> Tensor:
        """Spread scales or zero points, (rows, groups) or (1,), over a plane of the table.

        Returns:
            float32, (groups, padded rows).
        """
        shape = self.wide // self.group, self.table.shape[1]
        return spread(params.float(), self, self.group, torch.zeros(shape, dtype=torch.float32, device=params.device))

    def data_of(self, rows: slice) -> dict[str, Tensor | None] | None:
        """Return the tensors in `data` for whole tiles; None for other rows. The table is a view with gaps."""
        if rows.start % self.width or rows.stop % self.width:
            return None
        tiles = self.tiles[rows.start // self.width : rows.stop // self.width]
        return {"tiles": tiles, "table": self.table[:, rows], "nibbles": self.nibbles, "units": self.units}

    def codes(self, where: Rows) -> Tensor:
        """Return the unsigned codes of some rows."""
        nibbles = [self._nibbles(where, plane) for plane in range(self.planes)]
        if self.nibbles is None:
            return nibbles[0] - self._offset
        codes = torch.arange(self.nibbles.shape[1], dtype=torch.uint8, device=self.tiles.device)
        code_of = codes.new_zeros(16**self.planes).index_put((_in_base_16(self.nibbles),), codes)
        return looked_up(code_of, _in_base_16(nibbles))

    def _nibbles(self, where: Rows, plane: int) -> Tensor:
        """Return the nibbles of some rows in one plane: uint8, (rows, columns)."""
        half, start = self.tiles.shape[2], plane * self.wide
        columns = slice(start, start + self.layout.columns)
        if isinstance(where, Tensor):
            row = taken(torch.arange(self.layout.rows, device=where.device), where)
            lane = row % self.width
            byte = self.tiles[:, columns].transpose(1, 2)[row // self.width, lane % half]
            return (byte >> (4 * (lane >= half)).to(torch.uint8).unsqueeze(1)) & 15
        start, stop, _ = where.indices(self.layout.rows)
        first, last = start // self.width, -(-stop // self.width)
        both = self.tiles[first:last, columns].transpose(1, 2).contiguous()
        rows = torch.stack([both & 15, both >> 4], 1).reshape(-1, both.shape[2])
        return rows[start - first * self.width : stop - first * self.width]


def _in_base_16(nibbles: Iterable[Tensor]) -> Tensor:
    """Join the nibbles of each code to one int32."""
    return functools.reduce(lambda number, nibble: number * 16 + nibble.int(), nibbles, torch.tensor(0))


def _digits(weight: WeightLayout) -> dict[str, Any]:
    if planes(weight.spec) == 1:
        return {}
    digits, device = digits_of(weight.spec), weight.scale.device
    return {
        "nibbles": torch.tensor(digits.nibbles, dtype=torch.uint8, device=device),
        "units": torch.tensor(digits.units, dtype=torch.float32, device=device),
    }


def table_group(spec: QuantSpec, columns: int) -> int:
    """Choose the group of the table for which padded codes and table take the least memory."""
    fit_all = spec.groups(columns) == 1
    candidates = [group for group in TABLE_GROUPS if fit_all or spec.width(columns) % group == 0]
    return min(candidates, key=lambda group: -(-columns // group) * (group // 2 + 4))


def spread(params: Tensor, weight: WeightLayout, group: int, out: Tensor) -> Tensor:
    """Write scales or zero points, (rows, groups) or (1,), for each `group` columns to `out`: (groups, padded rows)."""
    rows, columns = weight.layout.matrix_shape
    params = params.expand(rows, -1)
    if params.shape[1] != out.shape[0]:
        first = torch.arange(out.shape[0], device=params.device) * group
        params = params[:, first.clamp(max=columns - 1) // weight.spec.width(columns)]
    out[:, :rows] = params.t()
    return out


def _transpose(x: Tensor, out: Tensor) -> None:
    """Write bytes (tiles, rows, columns) to `out` (tiles, columns, rows); columns are a multiple of 8."""
    # Eight bytes at a time, then within the eight: twice as fast as single bytes.
    tiles, rows, columns = x.shape
    eights = x.contiguous().view(torch.int64).transpose(1, 2).contiguous().view(torch.uint8)
    out.view(tiles, columns // 8, 8, rows).copy_(eights.view(tiles, columns // 8, rows, 8).transpose(2, 3))


Int4Tiles.register()
