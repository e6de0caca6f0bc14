"""`Codec`: which tensors a file holds for one row of the ledger, and how they become its value again."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import attrs
import torch
from torch import Tensor

from fewbits.checkpoint.chunks import Chunk
from fewbits.checkpoint.serializer import Entry
from fewbits.numerics.layout import Layout
from fewbits.numerics.parts import check_shape_part, part_shapes, shape_part
from fewbits.numerics.spec import CastSpec, QuantSpec
from fewbits.numerics.tensor import QuantizedTensor
from fewbits.selection.row import LedgerRow

#: The stored form of one tensor.
Value = QuantizedTensor | Tensor

#: Reads some elements of a stored tensor: its name, the first element, and the shape of the result.
ReadElements = Callable[[str, int, tuple[int, ...]], Tensor]

#: Parts that a tensor with a single scale has once, and not once a row.
_SHARED = ("scale", "zero_point")


class Codec:
    """Translates between the value of a ledger row and the named tensors that a file of fewbits holds for it."""

    def entries(self, row: LedgerRow) -> dict[str, Entry]:
        """Describe the tensors that a file holds for a row, by name; none for an alias or a merged tensor."""
        if row.fate in ("alias", "merged"):
            return {}
        if isinstance(row.spec, QuantSpec) and row.layout is not None:
            parts = _part_entries(row.layout, row.spec, row.dtype)
            return {part_name(row.name, part): entry for part, entry in parts.items()}
        return {row.name: Entry(row.shape, row.spec.dtype if isinstance(row.spec, CastSpec) else row.dtype)}

    def nbytes(self, row: LedgerRow) -> int:
        """Count the bytes of the tensors that a file holds for a row."""
        return sum(entry.nbytes for entry in self.entries(row).values())

    def sized(self, row: LedgerRow) -> LedgerRow:
        """Return the row with its bytes in a file of fewbits."""
        return attrs.evolve(row, bytes_after=self.nbytes(row))

    def encode(self, name: str, value: Value) -> dict[str, Tensor]:
        """Take a value apart into the tensors that a file holds, by their names there.

        Args:
            name: the name of the tensor in the source.
            value: the stored form of the tensor.
        """
        if isinstance(value, QuantizedTensor):
            return {part_name(name, part): tensor for part, tensor in value.parts().items()}
        return {name: value}

    def for_chunk(self, chunk: Chunk, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Select the tensors that a file takes with one chunk: those stored once per row come with the first chunk.

        Args:
            chunk: a chunk of a row.
            tensors: the encoded value of the chunk.
        """
        row = chunk.row
        if chunk.is_whole or not isinstance(row.spec, QuantSpec) or row.layout is None:
            return tensors
        once = {part_name(row.name, "shape"): shape_part(row.shape)}
        if row.spec.granularity == "tensor":
            shared = (part_name(row.name, part) for part in _SHARED)
            once |= {name: tensors[name] for name in shared if name in tensors}
        if chunk.is_first:
            return tensors | once
        return {name: tensor for name, tensor in tensors.items() if name not in once}

    def decode(self, row: LedgerRow, tensors: Callable[[str], Tensor]) -> Value:
        """Put the value of a row together out of whole tensors. They are not copied.

        Args:
            row: the tensor's row in the ledger; not an alias, and not merged into another.
            tensors: returns a tensor of the file, by its name there.

        Raises:
            FormatError: if the tensors do not fit the row.
        """
        if not isinstance(row.spec, QuantSpec) or row.layout is None:
            return tensors(row.name)
        names = _part_entries(row.layout, row.spec, row.dtype)
        parts = {part: tensors(part_name(row.name, part)) for part in names}
        return QuantizedTensor.from_parts(parts, spec=row.spec, layout=row.layout, dtype=row.dtype)

    def decode_chunk(self, chunk: Chunk, read: ReadElements) -> Value:
        """Put the value of a chunk together, reading no more of each tensor than the chunk needs.

        Args:
            chunk: a chunk of a row that is not an alias, and not merged into another.
            read: reads elements of a tensor in the file.

        Raises:
            FormatError: with the first chunk, if the stored shape is not that of the row.
        """
        row, described = chunk.row, chunk.described()
        if not isinstance(row.spec, QuantSpec) or described.layout is None:
            return read(row.name, chunk.start, described.shape)
        if chunk.is_first:
            check_shape_part(read(part_name(row.name, "shape"), 0, (len(row.shape),)), row.shape)
        first, per_tensor = chunk.rows[0], row.spec.granularity == "tensor"
        packed_along_rows = {"zero_point": row.spec.bits, "scale_codes": row.spec.scale_bits or 0}
        parts = {"shape": shape_part(described.shape)}
        for part, entry in _part_entries(described.layout, row.spec, row.dtype).items():
            rows = first * packed_along_rows.get(part, 32) // 32
            start = 0 if per_tensor and part != "packed" else rows * math.prod(entry.shape[1:])
            if part != "shape":
                parts[part] = read(part_name(row.name, part), start, entry.shape)
        return QuantizedTensor.from_parts(parts, spec=row.spec, layout=described.layout, dtype=row.dtype)

    def without_memory(self, row: LedgerRow) -> Value:
        """Make a value with the shapes and dtypes of a row. Its numbers mean nothing, and take no memory."""
        entries = self.entries(row)

        def ones(name: str) -> Tensor:
            if name == part_name(row.name, "shape"):
                return shape_part(row.shape)
            return torch.ones((), dtype=entries[name].dtype, device="cpu").expand(entries[name].shape)

        return self.decode(row, ones)


#: The codec of fewbits' own files.
CODEC = Codec()


def part_name(name: str, part: str) -> str:
    """The name in the file of one part of a quantized tensor: ``weight`` and ``scale`` give ``weight_scale``."""
    return f"{name}_{part}"


@functools.lru_cache(maxsize=1024)  # many of a model's thousands of tensors have the same shape
def _part_entries(layout: Layout, spec: QuantSpec, dtype: torch.dtype) -> Mapping[str, Entry]:
    return MappingProxyType({part: Entry(*entry) for part, entry in part_shapes(layout, spec, dtype).items()})
