"""`BytePairs`: 8-bit levels as whole numbers of two bytes, as torch's kernel for bytes reads them."""

from __future__ import annotations

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from fewbits.kernels.digits import levels_in_bytes
from fewbits.kernels.int8_rows import Int8Rows
from fewbits.kernels.weight_layouts import (
    Rows,
    WeightLayout,
    looked_up,
    refuses_any,
    refuses_padding,
    round_up,
    row_slices,
    taken,
)
from fewbits.numerics.layout import block_rows


@attrs.define(eq=False, kw_only=True)
class BytePairs(WeightLayout):
    """Levels of 8 bits as whole numbers of two signed bytes, ``256 * high + low``, in units of their own.

    A row holds the high bytes of all columns, then the low bytes, as if the weight had twice the inputs. Each half is
    padded with zeros to a multiple of 16, as in `Int8Rows`.

    Attributes:
        pairs: The bytes: int8, (rows, 2 * padded columns).
        numbers_of_pairs: The whole numbers of all codes, rising: int32, (codes,).
        unit_of_pairs: The factor from whole numbers to levels: float32, (1,).
    """

    name = "byte_pairs"
    data = ("pairs", "numbers_of_pairs", "unit_of_pairs")
    by_row = ("pairs",)
    MULTIPLE: ClassVar[int] = Int8Rows.MULTIPLE

    pairs: Tensor
    numbers_of_pairs: Tensor
    unit_of_pairs: Tensor

    @property
    def wide(self) -> int:
        """The number of padded columns."""
        return self.pairs.shape[1] // 2

    @property
    def row_scale(self) -> Tensor:
        """The factor from whole numbers to weights, for each row: float32, (1, rows) or (1,)."""
        return self.scale.t().float() * self.unit_of_pairs

    @classmethod
    def refuses(cls, weight: WeightLayout) -> str | None:
        """Say why this layout cannot hold a weight: it takes 8-bit levels without groups."""
        spec = weight.spec
        if reason := refuses_any(weight, takes_levels=True):
            return reason
        if spec.levels is None or spec.bits != 8:
            return "its codes are not indices of levels of 8 bits"
        if spec.granularity == "group":
            return "it takes no scales for groups"
        return refuses_padding(weight, cls.MULTIPLE)

    @classmethod
    def of(cls, weight: WeightLayout, *, reuse_memory: bool = False) -> BytePairs:
        """Convert a weight to pairs of bytes."""
        rows, columns = weight.layout.matrix_shape
        pairs = weight.scale.new_zeros((rows, 2, round_up(columns, cls.MULTIPLE)), dtype=torch.int8)
        levels, unit = levels_in_bytes(weight.spec)
        numbers = torch.tensor(levels, dtype=torch.int32, device=pairs.device)
        high = (numbers + 128) >> 8
        halves = torch.stack([high, numbers - 256 * high]).to(torch.int8)
        for where in row_slices(rows, block_rows(columns)):
            codes = weight.codes(where)
            for half, table in enumerate(halves):
                pairs[where, half, :columns] = looked_up(table, codes)
        units = torch.tensor([unit], dtype=torch.float32, device=pairs.device)
        return cls(pairs=pairs.view(rows, -1), numbers_of_pairs=numbers, unit_of_pairs=units, **weight.shared())

    def codes(self, where: Rows) -> Tensor:
        """Return the unsigned codes of some rows."""
        high, low = taken(self.pairs, where).view(-1, 2, self.wide)[..., : self.layout.columns].unbind(1)
        return torch.searchsorted(self.numbers_of_pairs, 256 * high.int() + low).to(torch.uint8)


BytePairs.register()
