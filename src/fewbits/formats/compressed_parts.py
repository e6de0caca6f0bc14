"""The tensors of a compressed-tensors checkpoint, and the parts of a `QuantizedTensor` out of them, by rows."""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.checkpoint.codec import part_name
from fewbits.checkpoint.sharded import ShardedReader
from fewbits.errors import FormatError
from fewbits.formats.compressed_weight import CompressedWeight, matrix_form
from fewbits.numerics.float8 import float8_codes
from fewbits.numerics.packing import pack, packed_words, unpack
from fewbits.numerics.tensor import pack_zero_point

#: The most axes that a weight has here.
_MOST_AXES = 8


def stated_shape(tensors: ShardedReader, name: str) -> tuple[int, ...] | None:
    """Read the ``shape`` stored beside the codes of a weight; None if the file has none.

    Raises:
        FormatError: if it is no shape.
    """
    part = part_name(name, "shape")
    entry = tensors.entries.get(part)
    if entry is None:
        return None
    if entry.dtype not in (torch.int64, torch.int32) or len(entry.shape) != 1 or not 2 <= entry.numel <= _MOST_AXES:
        raise FormatError(f"{part} is {entry}; a shape is two integers or more")
    return tuple(tensors.read_whole(part).tolist())


def column_order(tensors: ShardedReader, weight: CompressedWeight) -> Tensor:
    """The columns in the order of their groups.

    Raises:
        FormatError: if the groups are not as long as they should be.
    """
    part, width = weight.part("g_idx"), weight.spec.width(weight.layout.columns)
    groups = tensors.read_whole(part).long()
    order = torch.argsort(groups, stable=True)
    if not torch.equal(groups[order], torch.arange(len(groups)) // width):
        raise FormatError(f"{part} does not give each group {width} columns")
    return order


def packed_codes(tensors: ShardedReader, weight: CompressedWeight, order: Tensor | None, rows: slice) -> Tensor:
    """The codes of some rows, their columns in this order, packed as ours are.

    Raises:
        FormatError: if there is one that the weight cannot have.
    """
    count, columns, bits = rows.stop - rows.start, weight.layout.columns, weight.spec.bits
    if weight.form == "packed":
        words = packed_words(columns, bits)
        packed = tensors.read_chunk(weight.codes, rows.start * words, (count, words))
        return packed if order is None else pack(unpack(packed, bits, columns)[:, order], bits)
    values = tensors.read_chunk(weight.codes, rows.start * columns, (count, columns))
    codes = float8_codes(values) if weight.form == "float8" else _unsigned(weight, values)
    if codes is None:
        raise FormatError(f"{weight.codes} holds NaN or Inf")
    return pack(codes if order is None else codes[:, order], bits)


def scale_and_zero_point(tensors: ShardedReader, weight: CompressedWeight, rows: slice) -> tuple[Tensor, Tensor | None]:
    """The scales of some rows, and the zero points, packed as ours are; with these, the first is a multiple of 32.

    Raises:
        FormatError: if a zero point is beyond the bits of the weight.
    """
    spec, shared = weight.spec, weight.spec.granularity == "tensor"
    _, groups = matrix_form(tensors.entries[weight.part("scale")].shape)
    first, after = (0, 1) if shared else (rows.start // weight.block_rows, -(-rows.stop // weight.block_rows))
    scale = tensors.read_chunk(weight.part("scale"), first * groups, (after - first, groups))
    if weight.block_rows > 1:
        scale = scale[torch.arange(rows.start, rows.stop) // weight.block_rows - first]
    zero_point = None
    if weight.zero_point == "packed":
        words = packed_words(after - first, spec.bits)
        zero_point = tensors.read_chunk(weight.part("zero_point"), first * spec.bits // 32 * groups, (words, groups))
    elif weight.zero_point == "bytes":
        values = tensors.read_chunk(weight.part("zero_point"), first * groups, (after - first, groups))
        _unsigned(weight, values)
        zero_point = pack_zero_point(values.to(torch.int32), spec)
    if shared:
        return scale.reshape(1), None if zero_point is None else zero_point.reshape(-1)
    return scale, zero_point


def _unsigned(weight: CompressedWeight, values: Tensor) -> Tensor:
    """Signed codes of a byte each, made unsigned.

    Raises:
        FormatError: if one is beyond the bits that they should have.
    """
    low, high = map(int, torch.aminmax(values))
    if low < weight.spec.code_min or high > weight.spec.code_max:
        raise FormatError(f"{weight.name} has codes or zero points from {low} to {high}, beyond {weight.scheme}")
    return (values.to(torch.int16) - weight.spec.code_min).to(torch.uint8)
