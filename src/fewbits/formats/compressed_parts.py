"""Read a weight of compressed-tensors as the parts that a file of fewbits has for it.

Packed codes, scales and packed zero points are stored alike in both. Only codes and zero points in bytes, scales of
blocks, and columns in another order are converted.
"""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from fewbits.checkpoint.folder import ShardedReader
from fewbits.errors import FormatError
from fewbits.formats.compressed_weight import CompressedWeight
from fewbits.numerics.float8 import float8_codes
from fewbits.numerics.packing import pack, unpack
from fewbits.numerics.parts import shape_part

#: Largest number of axes of a weight.
_MOST_AXES = 8


def stated_shape(tensors: ShardedReader, part: str) -> tuple[int, ...] | None:
    """Return the shape of a weight stored beside its codes; None if there is no such part.

    Raises:
        FormatError: if the tensor is not a shape.
    """
    entry = tensors.entries.get(part)
    if entry is None:
        return None
    if entry.dtype not in (torch.int64, torch.int32) or len(entry.shape) != 1 or not 2 <= entry.numel <= _MOST_AXES:
        raise FormatError(f"{part} is {entry}; a shape is two integers or more, in one axis")
    return tuple(tensors.read_whole(part).tolist())


def column_order(tensors: ShardedReader, weight: CompressedWeight) -> Tensor | None:
    """Return the column indices, sorted by group; None if the columns are in group order.

    Raises:
        FormatError: if ``g_idx`` is not one integer per column, or a group does not have the group size's number of
            columns.
    """
    part, spec, columns = weight.part("g_idx"), weight.spec, weight.layout.columns
    entry = tensors.entries.get(part)
    if entry is None:
        return None
    if entry.dtype not in (torch.int32, torch.int64) or entry.shape != (columns,) or spec.granularity != "group":
        raise FormatError(f"{part} is {entry}; it must be one integer per column ({columns})")
    groups, width = tensors.read_whole(part).long(), spec.width(columns)
    order = torch.argsort(groups, stable=True)
    if not torch.equal(groups[order], torch.arange(columns) // width):
        raise FormatError(f"{part} does not give each group {width} columns")
    return order


@attrs.frozen(eq=False)
class WeightReader:
    """Reads a weight for `fewbits.checkpoint.codec.Codec.decode_chunk`.

    Attributes:
        tensors: the tensors of the checkpoint.
        weight: how the weight is stored.
        order: the column indices, sorted by group; None if the columns are in group order.
    """

    tensors: ShardedReader
    weight: CompressedWeight
    order: Tensor | None

    def read(self, name: str, start: int, shape: tuple[int, ...]) -> Tensor:
        """Read some elements of a part.

        Args:
            name: the name that the part has in a file of fewbits.
            start: the first element of the part there.
            shape: the shape of the result.

        Raises:
            FormatError: if a code is NaN or infinite, or a code or zero point is outside the range of its bits.
        """
        weight = self.weight
        if name == weight.part("shape"):
            return shape_part(weight.layout.shape)
        if name == weight.part("packed") and (weight.form != "packed" or self.order is not None):
            return self._packed(start // shape[1], shape)
        if name == weight.part("scale") and weight.block_rows > 1:
            return self._scales(start // shape[1], shape)
        if name == weight.part("zero_point") and weight.zero_point == "bytes":
            return self._zero_points(start, shape)
        return self.tensors.read_chunk(name, start, shape)

    def _packed(self, row: int, shape: tuple[int, ...]) -> Tensor:
        weight, columns = self.weight, self.weight.layout.columns
        if weight.form == "packed":
            codes = unpack(self.tensors.read_chunk(weight.codes, row * shape[1], shape), weight.spec.bits, columns)
        else:
            values = self.tensors.read_chunk(weight.codes, row * columns, (shape[0], columns))
            found = self._unsigned(values) if weight.form == "bytes" else float8_codes(values)
            if found is None:
                raise FormatError(f"{weight.codes} holds NaN or Inf")
            codes = found
        return pack(codes if self.order is None else codes[:, self.order], weight.spec.bits)

    def _scales(self, row: int, shape: tuple[int, ...]) -> Tensor:
        """Repeat the scales of blocks for each of their rows."""
        blocks = torch.arange(row, row + shape[0]) // self.weight.block_rows
        first, count = int(blocks[0]), int(blocks[-1] - blocks[0]) + 1
        scales = self.tensors.read_chunk(self.weight.part("scale"), first * shape[1], (count, shape[1]))
        return scales[blocks - first]

    def _zero_points(self, start: int, shape: tuple[int, ...]) -> Tensor:
        """Pack zero points along the rows. A chunk begins at a row whose zero point begins a word."""
        name, bits = self.weight.part("zero_point"), self.weight.spec.bits
        groups = shape[1] if len(shape) > 1 else 1
        first = start // groups * 32 // bits
        rows = min(shape[0] * 32 // bits, self.tensors.entries[name].numel // groups - first)
        values = self._unsigned(self.tensors.read_chunk(name, first * groups, (rows, groups)))
        return pack(values.T.contiguous(), bits).T.reshape(shape)

    def _unsigned(self, values: Tensor) -> Tensor:
        """Convert signed one-byte codes to unsigned.

        Raises:
            FormatError: if a code is outside the range of its bits.
        """
        weight, (low, high) = self.weight, map(int, torch.aminmax(values))
        if low < weight.spec.code_min or high > weight.spec.code_max:
            raise FormatError(f"{weight.name} has codes or zero points from {low} to {high}, beyond {weight.scheme}")
        return (values.to(torch.int16) - weight.spec.code_min).to(torch.uint8)
