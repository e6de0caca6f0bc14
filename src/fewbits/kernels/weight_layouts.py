"""Forms: the orders in which the codes of one weight can lie in memory. A kernel reads one of them.

`PackedInt32` is the canonical form, that of files. The others are private: while one is in use it replaces the
words, and gives them back exactly.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.kernels import features
from fewbits.numerics.affine import centered_codes, decode
from fewbits.numerics.dtypes import compute_dtype
from fewbits.numerics.layout import Layout, block_rows
from fewbits.numerics.packing import pack, packed_words, unpack
from fewbits.numerics.params import QuantParams
from fewbits.numerics.spec import QuantSpec
from fewbits.numerics.tensor import QuantizedTensor, narrow, unpack_zero_point

#: Which rows: some that follow one another, or those of an index.
Rows = slice | Tensor


@attrs.define(eq=False, kw_only=True)
class WeightLayout(ABC):
    """One weight, cut into a matrix of (rows, columns), in some order of its codes.

    Attributes:
        scale: as `QuantizedTensor` has it.
        zero_point: likewise, packed.
        input_scale: likewise.
        spec: how the codes look.
        layout: how the weight was cut.
        name: what this form is called.
        data: the names of the tensors that hold the codes.
    """

    name: ClassVar[str]
    data: ClassVar[tuple[str, ...]]

    scale: Tensor
    zero_point: Tensor | None
    input_scale: Tensor | None
    spec: QuantSpec
    layout: Layout

    @classmethod
    @abstractmethod
    def refuses(cls, weight: WeightLayout) -> str | None:
        """Why this weight cannot be laid out so; None if it can."""

    @classmethod
    @abstractmethod
    def of(cls, weight: WeightLayout, *, reuse_memory: bool = False) -> WeightLayout:
        """The same weight in this form.

        Args:
            weight: in any form.
            reuse_memory: whether the memory of the words of `weight` may be reused. Memory of their own
                size, freed between others, is not taken again by the C library's aligned allocations.
        """

    @abstractmethod
    def codes(self, where: Rows) -> Tensor:
        """Unsigned codes of some rows: uint8, (rows, columns)."""

    def words(self) -> Tensor:
        """The canonical words: int32, (rows, words); see `fewbits.numerics.packing`."""
        rows, columns = self.layout.matrix_shape
        words = self.scale.new_empty((rows, packed_words(columns, self.spec.bits)), dtype=torch.int32)
        for where in blocks(rows, columns):
            words[where] = pack(self.codes(where), self.spec.bits)
        return words

    def value(self, dtype: torch.dtype) -> QuantizedTensor:
        """The canonical form as a value, of a weight of `dtype`."""
        return QuantizedTensor(
            self.words(), self.scale, self.zero_point, self.spec, self.layout, dtype, self.input_scale
        )

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of this form, by field."""
        held = {name: getattr(self, name) for name in (*self.data, "scale", "zero_point", "input_scale")}
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    def decoded(self, where: Rows) -> Tensor:
        """What some rows stand for: (rows, columns), in float32 (float64 for float64 scales)."""
        return decode(self.codes(where), self.params(where), self.spec, compute_dtype(self.scale.dtype))

    def params(self, where: Rows) -> QuantParams:
        """Scale and unpacked zero point of some rows."""
        zero_point = unpack_zero_point(self.zero_point, self.scale, self.spec)
        if self.spec.granularity == "tensor":
            return QuantParams(self.scale, zero_point)
        return QuantParams(taken(self.scale, where), None if zero_point is None else taken(zero_point, where))

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight in its own shape, computed in float32 (float64 for float64 scales) and cast to `dtype`."""
        return self.layout.from_matrix(narrow(self.decoded(slice(None)), dtype))

    operand = dequantize

    def centered_codes(self) -> Tensor:
        """Codes less zero points: float64, in the weight's own shape."""
        return self.layout.from_matrix(centered_codes(self.codes(slice(None)), self.params(slice(None)), self.spec))


@attrs.define(eq=False, kw_only=True)
class PackedInt32(WeightLayout):
    """The canonical form: codes of any width in int32 words, row after row, as files hold them."""

    name = "words"
    data = ("packed",)

    packed: Tensor

    @classmethod
    def refuses(cls, weight: WeightLayout) -> str | None:
        """None: every weight can lie so."""
        return None

    @classmethod
    def of(cls, weight: WeightLayout, *, reuse_memory: bool = False) -> PackedInt32:
        """The words of a weight; those that it has, if it is in this form already."""
        return cls(packed=weight.words(), **shared(weight))

    @classmethod
    def of_value(cls, value: QuantizedTensor) -> PackedInt32:
        """A value as a form; it shares the tensors."""
        return cls(packed=value.packed, **shared(value))

    def words(self) -> Tensor:
        """The words themselves."""
        return self.packed

    def codes(self, where: Rows) -> Tensor:
        """Unsigned codes of some rows."""
        return unpack(taken(self.packed, where), self.spec.bits, self.layout.columns)


@attrs.define(eq=False, kw_only=True)
class Int8Rows(WeightLayout):
    """Signed codes of 8 bits, one to a byte; rows are filled up with zeros to a multiple of 16.

    Torch's ``_weight_int8pack_mm`` reads rows 16 bytes at a time, past their end if need be.

    Attributes:
        signed: int8, (rows, columns rounded up to a multiple of 16).
    """

    name = "bytes"
    data = ("signed",)
    MULTIPLE: ClassVar[int] = 16

    signed: Tensor
    #: A view of the scales, which a layer asks for at every call.
    _turned: Tensor = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._turned = self.scale.t()

    @property
    def row_scale(self) -> Tensor:
        """The scales, where a row has one: float32, (1, rows) or (1,)."""
        return self._turned if self._turned.dtype == torch.float32 else self._turned.float()

    @classmethod
    def refuses(cls, weight: WeightLayout) -> str | None:
        """Why not: it has codes of 8 bits, of a matrix whose rows are not too short."""
        rows, columns = weight.layout.matrix_shape
        if reason := refuses_any(weight):
            return reason
        if weight.spec.bits != 8:
            return f"codes of {weight.spec.bits} bits, not 8"
        if round_up(columns, cls.MULTIPLE) > 2 * columns:
            return f"filled up to {cls.MULTIPLE}, {rows} rows of {columns} would take more than twice the memory"
        return None

    @classmethod
    def of(cls, weight: WeightLayout, *, reuse_memory: bool = False) -> Int8Rows:
        """Lay out the codes of a weight."""
        rows, columns = weight.layout.matrix_shape
        wide = round_up(columns, cls.MULTIPLE)
        signed = _memory(weight, reuse_memory, rows, wide).view(torch.int8)
        signed[:, columns:] = 0
        if isinstance(weight, PackedInt32):
            unsigned = weight.packed.contiguous().view(-1).view(torch.int8).view(rows, -1)[:, :columns]
            torch.bitwise_xor(unsigned, -128, out=signed[:, :columns])
        else:
            torch.bitwise_xor(weight.codes(slice(None)).view(torch.int8), -128, out=signed[:, :columns])
        return cls(signed=signed, **shared(weight))

    def codes(self, where: Rows) -> Tensor:
        """Unsigned codes of some rows."""
        return (taken(self.signed, where)[:, : self.layout.columns] ^ -128).view(torch.uint8)


@attrs.define(eq=False, kw_only=True)
class Int4Tiles(WeightLayout):
    """Codes of 4 bits as torch's ``_weight_int4pack_mm_for_cpu`` reads them.

    A tile holds the codes of `width` rows, column after column: the low halves of its bytes are the first ``width / 2``
    rows, the high halves the others. The width depends on the instruction set. Rows are filled up to whole tiles, and
    columns to whole groups of the table, with codes that stand for zero.

    Attributes:
        tiles: uint8, (tiles, columns filled up, width / 2), unsigned codes.
        table: bfloat16, (groups, rows filled up, 2): scales, and what code 8 stands for.
        flat: the tiles, as torch's kernel takes them: (rows filled up, columns filled up / 2).
        group: how many columns share an entry of the table.
    """

    name = "tiles"
    data = ("tiles", "table")

    tiles: Tensor
    table: Tensor
    flat: Tensor = attrs.field(init=False)
    group: int = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        # A layer asks for them at every call.
        count, wide, half = self.tiles.shape
        self.flat, self.group = self.tiles.view(count * half * 2, wide // 2), wide // self.table.shape[0]

    @property
    def width(self) -> int:
        """How many rows a tile has."""
        return 2 * self.tiles.shape[2]

    @classmethod
    def refuses(cls, weight: WeightLayout) -> str | None:
        """Why not: it has codes of 4 bits, whole numbers, in groups that torch's kernel knows."""
        spec, (rows, columns) = weight.spec, weight.layout.matrix_shape
        if reason := refuses_any(weight):
            return reason
        if spec.bits != 4:
            return f"codes of {spec.bits} bits, not 4"
        if spec.width(columns) % min(TABLE_GROUPS) and spec.groups(columns) > 1:
            return f"groups of {spec.group_size}, which is no multiple of {min(TABLE_GROUPS)}"
        width, group = features.tile_width(), table_group(spec, columns)
        if width is None:
            return features.NO_TILES
        if round_up(rows, width) * round_up(columns, group) > 2 * rows * columns:
            return f"filled up to whole tiles, {rows} rows of {columns} would take more than twice the memory"
        return None

    @classmethod
    def of(cls, weight: WeightLayout, *, reuse_memory: bool = False) -> Int4Tiles:
        """Lay out the codes of a weight, and its scales beside them."""
        rows, columns = weight.layout.matrix_shape
        group, width = table_group(weight.spec, columns), features.tile_width() or max(features.WIDTHS)
        tall, wide = round_up(rows, width) // width, round_up(columns, group)
        # What stays is allocated first, and what is only needed meanwhile lies behind it: no holes between the layers.
        tiles = _memory(weight, reuse_memory, tall, wide, width // 2)
        table = tiles.new_zeros((wide // group, tall * width, 2), dtype=torch.bfloat16)
        params = weight.params(slice(None))
        spread(params.scale, weight, group, table[..., 0])
        if params.zero_point is not None:
            spread(-params.zero_point * params.scale.float(), weight, group, table[..., 1])
        for first in range(0, tall, step := _BLOCKS_AT_ONCE * max(1, block_rows(wide) // width)):
            count = min(step, tall - first)
            even, odd = _joined(weight, first * width, count, width, wide)
            columns_in_pairs = tiles[first : first + count].view(count, wide // 2, 2, width // 2)
            _turn(even, columns_in_pairs[:, :, 0])
            _turn(odd, columns_in_pairs[:, :, 1])
        return cls(tiles=tiles, table=table, **shared(weight))

    def of_groups(self, params: Tensor) -> Tensor:
        """Scales or the like, (rows, groups) or (1,), for the groups of the table: float32, (groups, rows filled)."""
        groups, tall, _ = self.table.shape
        return spread(params, self, self.group, params.new_zeros((groups, tall), dtype=torch.float32))

    def codes(self, where: Rows) -> Tensor:
        """Unsigned codes of some rows."""
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


#: The groups that ``_weight_int4pack_mm_for_cpu`` knows, the widest first.
TABLE_GROUPS = (256, 128, 64, 32)

#: How many of the usual blocks are laid out as tiles at a time: they are halves of bytes, and calls cost too.
_BLOCKS_AT_ONCE = 8

WEIGHT_LAYOUTS: Mapping[str, type[WeightLayout]] = {form.name: form for form in (PackedInt32, Int8Rows, Int4Tiles)}


def taken(rows: Tensor, where: Rows) -> Tensor:
    """Some rows. An index has to lie within them, as that of an embedding."""
    return rows.index_select(0, where) if isinstance(where, Tensor) else rows[where]


def round_up(count: int, multiple: int) -> int:
    """The next multiple."""
    return -(-count // multiple) * multiple


def table_group(spec: QuantSpec, columns: int) -> int:
    """The group of the table with which codes, filled up, and table take the least memory."""
    width = spec.width(columns)
    fitting = [g for g in TABLE_GROUPS if width % g == 0] or [min(TABLE_GROUPS)]
    if spec.groups(columns) == 1:
        fitting = list(TABLE_GROUPS)
    return min(fitting, key=lambda g: -(-columns // g) * (g // 2 + 4))


def spread(params: Tensor, weight: WeightLayout, group: int, out: Tensor) -> Tensor:
    """Write scales or the like, (rows, groups) or (1,), of each `group` columns to `out`: (groups, rows filled up)."""
    rows, columns = weight.layout.matrix_shape
    params = params.expand(rows, -1)
    if params.shape[1] != out.shape[0]:
        first = torch.arange(out.shape[0], device=params.device) * group
        params = params[:, first.clamp(max=columns - 1) // weight.spec.width(columns)]
    out[:, :rows] = params.t()
    return out


def refuses_any(weight: WeightLayout) -> str | None:
    """Why no private form can hold this weight; None if one may."""
    if weight.scale.device.type != "cpu":
        return f"the weight is on {weight.scale.device}, not on the CPU"
    if weight.spec.levels is not None:
        return "its codes stand for levels, not for whole numbers"
    if weight.layout != Layout.of(weight.layout.shape) or len(weight.layout.shape) != 2:
        return f"it is no matrix of outputs by inputs, but of shape {weight.layout.shape}"
    if weight.scale.dtype == torch.float64:
        return "it has float64 scales, which ask for float64 products"
    if not weight.layout.rows * weight.layout.columns:
        return "it has no elements"
    return None


def _joined(weight: WeightLayout, first: int, tiles: int, width: int, wide: int) -> tuple[Tensor, Tensor]:
    """The bytes of some tiles before they are turned round: those of even columns, and those of odd ones.

    Returns:
        two of uint8, (tiles, width / 2, wide / 2): in a byte's low half the first half of a tile's rows.
    """
    rows = slice(first, first + tiles * width)
    if isinstance(weight, PackedInt32) and weight.layout.columns == wide and rows.stop <= weight.layout.rows:
        # Words hold an even column and the next odd one in a byte.
        low, high = weight.packed[rows].contiguous().view(-1).view(torch.uint8).view(tiles, 2, width // 2, -1).unbind(1)
        return low & 15 | high << 4, low >> 4 | high & 0xF0
    codes = weight.codes(rows)
    filler = tiles * width - codes.shape[0]
    codes = F.pad(codes, (0, wide - codes.shape[1], 0, filler), value=-weight.spec.code_min)
    low, high = codes.reshape(tiles, 2, width // 2, wide).unbind(1)
    both = low | high << 4
    return both[..., ::2], both[..., 1::2]


def _turn(x: Tensor, out: Tensor) -> None:
    """Write (tiles, rows, columns) of bytes to `out`, (tiles, columns, rows); the columns are a multiple of 8."""
    # Eight bytes at a time, then within those eight: less than half the time that single bytes take.
    tiles, rows, columns = x.shape
    eights = x.contiguous().view(torch.int64).transpose(1, 2).contiguous().view(torch.uint8)
    out.view(tiles, columns // 8, 8, rows).copy_(eights.view(tiles, columns // 8, rows, 8).transpose(2, 3))


def _memory(weight: WeightLayout, reuse_memory: bool, *shape: int) -> Tensor:
    """Bytes of this shape, not initialized: those of the weight's words, if there are as many."""
    words = weight.packed if reuse_memory and isinstance(weight, PackedInt32) else None
    if words is not None and words.is_contiguous() and words.nbytes == math.prod(shape) and not words.is_inference():
        return words.view(-1).view(torch.uint8).view(shape)
    return weight.scale.new_empty(shape, dtype=torch.uint8)


def shared(weight: WeightLayout | QuantizedTensor) -> dict[str, Any]:
    """What all forms of one weight have in common."""
    fields = ("scale", "zero_point", "input_scale", "spec", "layout")
    return {field: getattr(weight, field) for field in fields}


def blocks(rows: int, columns: int) -> list[slice]:
    """All rows, in blocks that fit a cache."""
    step = block_rows(columns)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
