"""The block types of GGUF that hold the same numbers as codes of fewbits.

A row is cut into blocks of 32 elements. A block holds a scale ``d`` in float16, in some types an offset ``m`` in
float16, and 32 unsigned codes ``u``:

======  ====================  ============================================================================
type    numbers               bytes of the codes
======  ====================  ============================================================================
Q4_0    ``d * (u - 8)``       byte j holds the codes j (low bits) and j + 16
Q4_1    ``d * u + m``         the same
Q5_0    ``d * (u - 16)``      four bytes with the highest bit of every code, then the other bits as in Q4_0
Q5_1    ``d * u + m``         the same
Q8_0    ``d * (u - 128)``     ``u - 128``, as int8
======  ====================  ============================================================================
"""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import torch
from torch import Tensor

from fewbits.errors import FormatError
from fewbits.numerics.dtypes import dtype_name
from fewbits.numerics.layout import Layout
from fewbits.numerics.params import QuantParams, are_sound
from fewbits.numerics.spec import QuantSpec
from fewbits.numerics.tensor import QuantizedTensor

#: Elements in a block.
BLOCK = 32

#: Replaces a scale of zero, which fewbits does not have. All codes of such a block decode to zero.
_TINY = torch.finfo(torch.float16).tiny


@attrs.frozen
class BlockType:
    """A block type.

    Attributes:
        name: its name in the gguf package.
        bits: the bits of a code.
        offset: whether a block has an offset.
    """

    name: str
    bits: int
    offset: bool = False

    @property
    def nbytes(self) -> int:
        """The bytes of a block."""
        return (4 if self.offset else 2) + BLOCK * self.bits // 8

    @property
    def zero(self) -> int:
        """The unsigned code of zero in a type without offset."""
        return 1 << (self.bits - 1)

    @property
    def spec(self) -> QuantSpec:
        """The spec of a tensor that is read from such blocks. Other tools need not round to the nearest code."""
        return QuantSpec(
            self.bits,
            "group",
            group_size=BLOCK,
            symmetric=not self.offset,
            scale_dtype=torch.float16,
            rounding="free",
        )

    def unpack(self, data: Tensor) -> tuple[Tensor, Tensor]:
        """Return the codes and the scales of some rows.

        Args:
            data: uint8, (rows, bytes of a row).

        Returns:
            the unsigned codes, uint8 of (rows, blocks, 32); and float16 of (rows, blocks, 1), or of (rows, blocks, 2)
            with the offsets.
        """
        blocks = data.reshape(len(data), -1, self.nbytes)
        head = 4 if self.offset else 2
        scales, body = blocks[..., :head].contiguous().view(torch.float16), blocks[..., head:]
        if self.bits == 8:
            return body ^ 128, scales
        codes = torch.cat([body[..., -16:] & 15, body[..., -16:] >> 4], -1)
        if self.bits == 5:
            highest = body[..., :4, None] >> torch.arange(8, dtype=torch.uint8) & 1
            codes |= highest.flatten(-2) << 4
        return codes, scales

    def pack(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Undo `unpack`."""
        if self.bits == 8:
            body = codes ^ 128
        else:
            body = codes[..., :16] & 15 | codes[..., 16:] << 4
        if self.bits == 5:
            highest = (codes >> 4).reshape(*codes.shape[:-1], 4, 8) << torch.arange(8, dtype=torch.uint8)
            body = torch.cat([highest.sum(-1, dtype=torch.uint8), body], -1)
        return torch.cat([scales.contiguous().view(torch.uint8), body], -1).flatten(1)


#: All of them by name, the smallest first.
BLOCK_TYPES: Mapping[str, BlockType] = {
    kind.name: kind
    for kind in (
        BlockType("Q4_0", 4),
        BlockType("Q4_1", 4, offset=True),
        BlockType("Q5_0", 5),
        BlockType("Q5_1", 5, offset=True),
        BlockType("Q8_0", 8),
    )
}


def has_zero_points(kind: BlockType, data: Tensor) -> bool:
    """Tell whether every offset is the negative of a code times the scale, so that the code is a zero point.

    Args:
        kind: a type with offsets.
        data: uint8, (rows, bytes of a row).
    """
    scale, offset = kind.unpack(data)[1].float().unbind(-1)
    steps = _steps(scale, offset)
    exact = (steps == steps.round()) & (-steps * scale == offset)
    return bool((exact & (steps >= 0) & (steps < 1 << kind.bits)).all())


def _steps(scale: Tensor, offset: Tensor) -> Tensor:
    """Return how many scales make the negative of the offset; 0 where both are zero."""
    return torch.where((scale == 0) & (offset == 0), 0.0, -offset / scale)


def read_blocks(kind: BlockType, data: Tensor, shape: tuple[int, ...]) -> QuantizedTensor:
    """Read a tensor with its codes unchanged. Where a scale is zero, the codes become those of zero.

    Args:
        kind: the type of the blocks; one with offsets needs `has_zero_points`.
        data: uint8, (rows, bytes of a row).
        shape: the shape of the tensor.

    Raises:
        FormatError: if a scale is NaN or Inf.
    """
    codes, scales = kind.unpack(data)
    scale, zero_point, zero = scales[..., 0], None, torch.tensor(kind.zero, dtype=torch.uint8)
    if kind.offset:
        steps = _steps(*scales.float().unbind(-1))
        zero_point, zero = steps.to(torch.int32) - kind.zero, steps.to(torch.uint8)[..., None]
    codes = torch.where(scale[..., None] == 0, zero, codes)
    scale = torch.where(scale == 0, torch.copysign(torch.tensor(_TINY, dtype=scale.dtype), scale), scale)
    if not are_sound(scale):
        raise FormatError(f"a scale of its {kind.name} blocks is NaN or Inf")
    layout = Layout.of(shape)
    return QuantizedTensor.from_codes(
        codes.flatten(1).to(torch.int16) - kind.zero,
        QuantParams(scale, zero_point),
        spec=kind.spec,
        layout=layout,
        dtype=torch.float32,
    )


def write_blocks(kind: BlockType, value: QuantizedTensor) -> Tensor:
    """Write the codes of a tensor as blocks. A block of zeros gets the scale zero, as llama.cpp gives it.

    Args:
        kind: a type from `block_type`.
        value: the tensor.

    Returns:
        uint8, (rows, bytes of a row).
    """
    scale, steps = _by_block(value)
    codes = value.codes().to(torch.int16).reshape(*scale.shape, BLOCK) - value.spec.code_min
    centered = codes - steps[..., None]
    scale = torch.where((centered == 0).all(-1), torch.copysign(torch.zeros_like(scale), scale), scale)
    if not kind.offset:
        return kind.pack((centered + kind.zero).to(torch.uint8), scale[..., None].to(torch.float16))
    scales = torch.stack([scale, 0 - steps * scale], -1)
    return kind.pack(codes.to(torch.uint8), scales.to(torch.float16))


def _by_block(value: QuantizedTensor) -> tuple[Tensor, Tensor]:
    """Return the scale of each block, and the unsigned code that decodes to zero: float64 and int16, (rows, blocks)."""
    params, spec, (rows, columns) = value.params(), value.spec, value.layout.matrix_shape
    group = torch.arange(0, columns, BLOCK) // spec.width(columns)

    def spread(each: Tensor) -> Tensor:
        return each.reshape(-1, each.shape[-1]).expand(rows, -1)[:, group]

    zero_point = torch.zeros(1) if params.zero_point is None else params.zero_point
    zeros = zero_point.expand(params.scale.shape) - spec.code_min
    return spread(params.scale.double()), spread(zeros.to(torch.int16))


def spec_problem(spec: QuantSpec, columns: int) -> str:
    """Return why no block holds codes of a spec, whatever their values; "" if one may."""
    if spec.levels is not None:
        return f"is {spec}, and blocks of GGUF hold whole numbers times a scale"
    if columns % BLOCK or (spec.granularity == "group" and spec.width(columns) % BLOCK):
        return f"is {spec} with rows of {columns:,}; rows and groups of GGUF are multiples of {BLOCK}"
    return ""


def block_type(value: QuantizedTensor) -> BlockType | str:
    """Return the smallest type whose blocks hold exactly the numbers of a tensor, or why there is none."""
    spec = value.spec
    if problem := spec_problem(spec, value.layout.columns):
        return problem
    scale, steps = _by_block(value)
    if not _is_half(scale):
        two_levels = " and without scale_bits" if spec.scale_bits else ""
        return (
            f"has {dtype_name(value.scale.dtype)} scales that float16 does not hold exactly; quantize it with "
            f"scale_dtype=float16 (--scale-dtype float16){two_levels}"
        )
    for kind in BLOCK_TYPES.values():
        if _fits(kind, spec) and not (kind.offset and not _is_half(steps * scale)):
            return kind
    return f"is {spec}, and no block of GGUF has codes of that range"


def _is_half(numbers: Tensor) -> bool:
    return torch.equal(numbers.half().double(), numbers)


def _fits(kind: BlockType, spec: QuantSpec) -> bool:
    """Tell whether a type has a code for every number that a spec can store, in units of the scale."""
    if kind.offset:
        return not spec.symmetric and spec.bits <= kind.bits
    least = spec.code_min if spec.symmetric else spec.code_min - spec.code_max
    return -kind.zero <= least
