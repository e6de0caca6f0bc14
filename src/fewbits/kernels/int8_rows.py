"""The weight layouts of codes of 8 bits: `Int8Rows` for kernels, `PlainInt8` for weights that are decoded."""

from __future__ import annotations

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from fewbits.kernels.weight_layouts import (
    HIGHEST_BITS,
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
from fewbits.numerics.affine import is_observed


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
        write_signed(weight, signed[:, :columns])
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


@attrs.define(eq=False, kw_only=True)
class PlainInt8(WeightLayout):
    """Signed 8-bit codes, one per byte, with one scale for a row or for the tensor.

    Convolutions and embeddings hold it, for which no kernel computes. Two operations decode it; words need seven.

    Attributes:
        signed_bytes: The codes: int8, (rows, columns).
    """

    name = "plain_int8"
    data = by_row = ("signed_bytes",)

    signed_bytes: Tensor
    #: Whether the matrix has its elements in the order of the weight; kept because a layer needs it at every call.
    _in_order: bool = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._in_order = self.layout.in_order

    @classmethod
    def refuses(cls, weight: WeightLayout) -> str | None:
        """Say why this layout cannot hold a weight: it takes symmetric codes, on the CPU."""
        if weight.scale.device.type != "cpu":
            return f"the weight is on {weight.scale.device}, not on the CPU"
        if not has_byte_rows(weight.spec):
            return "its codes are not symmetric integers of 8 bits with one scale for a row or for the tensor"
        return None

    @classmethod
    def of(cls, weight: WeightLayout, *, reuse_memory: bool = False) -> PlainInt8:
        """Convert a weight to signed bytes."""
        signed = reused_memory(weight, reuse_memory, *weight.layout.matrix_shape).view(torch.int8)
        write_signed(weight, signed)
        return cls(signed_bytes=signed, **weight.shared())

    def words(self) -> Tensor:
        """Return the canonical words, in new memory."""
        if self.layout.columns % 4 or not self.signed_bytes.is_contiguous() or not self.signed_bytes.numel():
            return super().words()
        return self.signed_bytes.view(torch.int32) ^ HIGHEST_BITS

    def codes(self, where: Rows) -> Tensor:
        """Return the unsigned codes of some rows."""
        return (self.signed_codes(where) ^ -128).view(torch.uint8)

    def signed_codes(self, where: Rows) -> Tensor:
        """Return the signed codes of some rows: int8, (rows, columns). They may share memory with the weight."""
        return taken(self.signed_bytes, where)

    def decoded(self, where: Rows) -> Tensor:
        """Decode some rows: (rows, columns), in float32 (float64 for float64 scales)."""
        return decoded_bytes(self, where)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Decode the weight as `WeightLayout.dequantize` does: in two operations, if no gradient is recorded."""
        scale = self.scale
        if not (self._in_order and dtype == scale.dtype == torch.float32) or is_observed(scale):
            return super().dequantize(dtype)
        return self.signed_bytes.to(torch.float32).mul_(scale).view(self.layout.shape)

    def centered_codes(self) -> Tensor:
        """Return the signed codes: float64, in the weight's own shape."""
        return self.layout.from_matrix(self.signed_bytes.to(torch.float64))


def write_signed(weight: WeightLayout, signed: Tensor) -> None:
    """Write the signed 8-bit codes of a weight, (rows, columns), which may overwrite its words."""
    rows, columns = weight.layout.matrix_shape
    if isinstance(weight, PackedInt32):  # without the copy that `signed_codes` makes
        unsigned = weight.packed.contiguous().view(-1).view(torch.int8)
        unsigned = unsigned.view(rows, 4 * weight.packed.shape[1])[:, :columns]
    else:
        unsigned = weight.codes(slice(None)).view(torch.int8)
    torch.bitwise_xor(unsigned, -128, out=signed)


Int8Rows.register()
PlainInt8.register()
