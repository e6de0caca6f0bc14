"""`Int8Rows`: the weight layout of kernels for codes of 8 bits."""

from __future__ import annotations

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from fewbits.kernels.weight_layouts import (
    PackedInt32,
    Rows,
    WeightLayout,
    decoded_bytes,
    has_byte_rows,
    refuses_any,
    refuses_padding,
    reused_memory,
    round_up,
    taken,
)


@attrs.define(eq=False, kw_only=True)
class Int8Rows(WeightLayout):
    """Signed 8-bit codes, one per byte; rows are padded with zeros to a multiple of 16.

    Torch's ``_weight_int8pack_mm`` reads rows 16 bytes at a time, and past the end of an unpadded row.

    Attributes:
        signed: The codes: int8, (rows, columns rounded up to a multiple of 16).
    """

    name = "int8_rows"
    data = by_row = ("signed",)
    MULTIPLE: ClassVar[int] = 16

    signed: Tensor
    #: A view of the scales, kept because a layer needs it at every call.
    _transposed_scale: Tensor = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._transposed_scale = self.scale.t()

    @property
    def row_scale(self) -> Tensor:
        """The scales, of a weight with at most one scale per row: float32, (1, rows) or (1,)."""
        return self._transposed_scale.float()

    @classmethod
    def refuses(cls, weight: WeightLayout) -> str | None:
        """Say why this layout cannot hold a weight: it takes 8-bit codes, of a matrix whose rows are not too short."""
        if reason := refuses_any(weight):
            return reason
        if weight.spec.bits != 8:
            return f"codes of {weight.spec.bits} bits, not 8"
        return refuses_padding(weight, cls.MULTIPLE)

    @classmethod
    def of(cls, weight: WeightLayout, *, reuse_memory: bool = False) -> Int8Rows:
        """Convert a weight to signed bytes."""
        rows, columns = weight.layout.matrix_shape
        wide = round_up(columns, cls.MULTIPLE)
        signed = reused_memory(weight, reuse_memory, rows, wide).view(torch.int8)
        signed[:, columns:] = 0
        if isinstance(weight, PackedInt32):  # without the copy that `signed_codes` makes
            unsigned = weight.packed.contiguous().view(-1).view(torch.int8).view(rows, -1)[:, :columns]
        else:
            unsigned = weight.codes(slice(None)).view(torch.int8)
        torch.bitwise_xor(unsigned, -128, out=signed[:, :columns])
        return cls(signed=signed, **weight.shared())

    def codes(self, where: Rows) -> Tensor:
        """Return the unsigned codes of some rows."""
        return (self.signed_codes(where) ^ -128).view(torch.uint8)

    def signed_codes(self, where: Rows) -> Tensor:
        """Return the signed codes of some rows: int8, (rows, columns). They may share memory with the weight."""
        return taken(self.signed, where)[:, : self.layout.columns]

    def decoded(self, where: Rows) -> Tensor:
        """Decode some rows: (rows, columns), in float32. Symmetric codes with a scale for each row need no offset."""
        return decoded_bytes(self, where) if has_byte_rows(self.spec) else super().decoded(where)


Int8Rows.register()
