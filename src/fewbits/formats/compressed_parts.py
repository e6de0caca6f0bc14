"""Read the tensors of a compressed-tensors checkpoint and convert them, by rows, to parts of a `QuantizedTensor`."""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.checkpoint.codec import part_name
from fewbits.checkpoint.folder import ShardedReader
from fewbits.errors import FormatError
from fewbits.formats.compressed_weight import CompressedWeight, matrix_form
from fewbits.numerics.float8 import float8_codes
from fewbits.numerics.packing import pack, packed_words, unpack
from fewbits.numerics.tensor import pack_zero_point

#: Largest number of axes of a weight.
_MOST_AXES = 8


def stated_shape(tensors: ShardedReader, name: str) -> tuple[int, ...] | None:
    """Return the shape of a weight stored beside its codes; None if no shape is stored.

    Raises:
        FormatError: if the tensor is not a shape.
    """
    part = part_name(name, "shape")
    entry = tensors.entries.get(part)
    if entry is None:
        return None
    if entry.dtype not in (torch.int64, torch.int32) or len(entry.shape) != 1 or not 2 <= entry.numel <= _MOST_AXES:
        raise FormatError(f"{part} is {entry}; a shape is two integers or more, in one axis")
    return tuple(tensors.read_whole(part).tolist())


def column_order(tensors: ShardedReader, weight: CompressedWeight) -> Tensor:
    """Return the column indices, sorted by group.

    Raises:
        FormatError: if a group does not have the group size's number of columns.
    """
    part, width = weight.part("g_idx"), weight.spec.width(weight.layout.columns)
    groups = tensors.read_whole(part).long()
    order = torch.argsort(groups, stable=True)
    if not torch.equal(groups[order], torch.arange(len(groups)) // width):
        raise FormatError(f"{part} does not give each group {width} columns")
    return order


def packed_codes(tensors: ShardedReader, weight: CompressedWeight, order: Tensor | None, rows: slice) -> Tensor:
    """Return the codes of some rows, with columns in the given order, packed as in `fewbits.numerics.packing`.

    Raises:
        FormatError: if a code is NaN, infinite, or outside the range of its bits.
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
    """Return the scales of some rows and their zero points, packed as in fewbits files.

    With zero points, the first row must be a multiple of 32.

    Raises:
        FormatError: if a zero point is outside the range of its bits.
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
    """Convert signed one-byte codes to unsigned.

    Raises:
        FormatError: if a code is outside the range of its bits.
    """
    low, high = map(int, torch.aminmax(values))
    if low < weight.spec.code_min or high > weight.spec.code_max:
        raise FormatError(f"{weight.name} has codes or zero points from {low} to {high}, beyond {weight.scheme}")
    return (values.to(torch.int16) - weight.spec.code_min).to(torch.uint8)
