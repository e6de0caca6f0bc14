"""`Int4Tiles`: four-bit codes as torch's kernel for them reads them."""

from __future__ import annotations

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.kernels import features
from fewbits.kernels.weight_layouts import PackedInt32, Rows, WeightLayout, refuses_any, reused_memory, round_up, taken
from fewbits.numerics.layout import block_rows
from fewbits.numerics.spec import QuantSpec

#: The groups that ``_weight_int4pack_mm_for_cpu`` knows, the widest first.
TABLE_GROUPS = (256, 128, 64, 32)

#: How many of the usual blocks are converted at a time: 4-bit codes are small, and calls have a cost.
_BLOCKS_AT_ONCE = 8


@attrs.define(eq=False, kw_only=True)
class Int4Tiles(WeightLayout):
    """Codes of 4 bits in the order of torch's ``_weight_int4pack_mm_for_cpu``.

    A tile holds the codes of `width` rows, column after column: the low halves of its bytes are the first ``width / 2``
    rows, the high halves the others. The width depends on the instruction set. Rows are padded to whole tiles, and
    columns to whole groups of the table, with codes that decode to zero.

    Attributes:
        tiles: Unsigned codes: uint8, (tiles, padded columns, width / 2).
        table: Scales, and the values of code 8: bfloat16, (groups, padded rows, 2).
        flat: The tiles in the shape that torch's kernel takes: (padded rows, padded columns / 2).
        group: How many columns share an entry of the table.
    """

    name = "int4_tiles"
    data = ("tiles", "table")

    tiles: Tensor
    table: Tensor
    flat: Tensor = attrs.field(init=False)
    group: int = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        # Kept, because a layer needs them at every call.
        count, wide, half = self.tiles.shape
        self.flat, self.group = self.tiles.view(count * half * 2, wide // 2), wide // self.table.shape[0]

    @property
    def width(self) -> int:
        """The number of rows in a tile."""
        return 2 * self.tiles.shape[2]

    @classmethod
    def refuses(cls, weight: WeightLayout) -> str | None:
        """Say why this layout cannot hold a weight: it takes 4-bit integers in groups that torch's kernel knows."""
        spec, (rows, columns) = weight.spec, weight.layout.matrix_shape
        if reason := refuses_any(weight):
            return reason
        if spec.bits != 4:
            return f"codes of {spec.bits} bits, not 4"
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
        tall, wide = round_up(rows, width) // width, round_up(columns, group)
        # The tensors that stay are allocated before temporary ones, so that no holes remain between layers.
        tiles = reused_memory(weight, reuse_memory, tall, wide, width // 2)
        table = tiles.new_zeros((wide // group, tall * width, 2), dtype=torch.bfloat16)
        params = weight.params(slice(None))
        spread(params.scale, weight, group, table[..., 0])
        if params.zero_point is not None:
            spread(-params.zero_point * params.scale.float(), weight, group, table[..., 1])
        for first in range(0, tall, step := _BLOCKS_AT_ONCE * max(1, block_rows(wide) // width)):
            count = min(step, tall - first)
            even, odd = _joined(weight, first * width, count, width, wide)
            columns_in_pairs = tiles[first : first + count].view(count, wide // 2, 2, width // 2)
            _transpose(even, columns_in_pairs[:, :, 0])
            _transpose(odd, columns_in_pairs[:, :, 1])
        return cls(tiles=tiles, table=table, **weight.shared())

    def of_groups(self, params: Tensor) -> Tensor:
        """Spread scales or zero points, (rows, groups) or (1,), over the table: float32, (groups, padded rows)."""
        groups, tall, _ = self.table.shape
        return spread(params, self, self.group, params.new_zeros((groups, tall), dtype=torch.float32))

    def codes(self, where: Rows) -> Tensor:
        """Return the unsigned codes of some rows."""
        half, columns = self.tiles.shape[2], self.layout.columns
        if isinstance(where, Tensor):
            row = taken(torch.arange(self.layout.rows, device=where.device), where)
            lane = row % self.width
            byte = self.tiles.transpose(1, 2)[row // self.width, lane % half, :columns]
            return (byte >> (4 * (lane >= half)).to(torch.uint8).unsqueeze(1)) & 15
        start, stop, _ = where.indices(self.layout.rows)
        first, last = start // self.width, -(-stop // self.width)
        both = self.tiles[first:last].transpose(1, 2).contiguous()
        rows = torch.stack([both & 15, both >> 4], 1).reshape(-1, both.shape[2])
        return rows[start - first * self.width : stop - first * self.width, :columns]


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


def _joined(weight: WeightLayout, first: int, tiles: int, width: int, wide: int) -> tuple[Tensor, Tensor]:
    """Return the bytes of some tiles before they are transposed: even columns, and odd columns.

    Returns:
        Two tensors of uint8, (tiles, width / 2, wide / 2); low halves of bytes are the first half of a tile's rows.
    """
    rows = slice(first, first + tiles * width)
    if isinstance(weight, PackedInt32) and weight.layout.columns == wide and rows.stop <= weight.layout.rows:
        # A byte of the words holds an even column and the next odd one.
        low, high = weight.packed[rows].contiguous().view(-1).view(torch.uint8).view(tiles, 2, width // 2, -1).unbind(1)
        return low & 15 | high << 4, low >> 4 | high & 0xF0
    codes = weight.codes(rows)
    padding = tiles * width - codes.shape[0]
    codes = F.pad(codes, (0, wide - codes.shape[1], 0, padding), value=-weight.spec.code_min)
    low, high = codes.reshape(tiles, 2, width // 2, wide).unbind(1)
    both = low | high << 4
    return both[..., ::2], both[..., 1::2]


def _transpose(x: Tensor, out: Tensor) -> None:
    """Write bytes (tiles, rows, columns) to `out` (tiles, columns, rows); columns are a multiple of 8."""
    # Eight bytes at a time, then within the eight: twice as fast as single bytes.
    tiles, rows, columns = x.shape
    eights = x.contiguous().view(torch.int64).transpose(1, 2).contiguous().view(torch.uint8)
    out.view(tiles, columns // 8, 8, rows).copy_(eights.view(tiles, columns // 8, rows, 8).transpose(2, 3))


Int4Tiles.register()
