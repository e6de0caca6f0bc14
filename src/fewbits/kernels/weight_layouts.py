"""Weight layouts: the order in which the codes of one weight lie in memory. A kernel reads one layout.

Files hold `PackedInt32`, the canonical layout. The others are private to their kernels: a module holds its weight in
one layout at a time, and every layout gives the canonical words back exactly.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor

from fewbits.errors import ArgumentError
from fewbits.numerics.affine import centered_codes, decode, is_observed
from fewbits.numerics.dtypes import compute_dtype
from fewbits.numerics.layout import BLOCK_ELEMENTS, Layout, block_rows
from fewbits.numerics.packing import pack, packed_words, unpack
from fewbits.numerics.params import QuantParams
from fewbits.numerics.parts import unpack_params
from fewbits.numerics.spec import QuantSpec
from fewbits.numerics.tensor import QuantizedTensor, narrow

#: Rows of a weight: a slice, or an index tensor.
Rows = slice | Tensor

#: The fields that all layouts of one weight share.
_SHARED = ("scale", "scale_codes", "zero_point", "input_scale", "spec", "layout")

#: Those of them that are tensors.
_SHARED_TENSORS = ("scale", "scale_codes", "zero_point", "input_scale")

#: The highest bit of each byte of a word: flipping it turns unsigned codes of 8 bits into signed ones.
HIGHEST_BITS = -0x7F7F7F80

#: The layouts that this process knows, by name.
WEIGHT_LAYOUTS: dict[str, type[WeightLayout]] = {}


@attrs.define(eq=False, kw_only=True)
class WeightLayout(ABC):
    """One weight, cut into a matrix of (rows, columns), with its codes in some order.

    A subclass has one field for each tensor in `data`, and defines `of`, `codes` and, unless it can hold every weight,
    `refuses`.

    Attributes:
        scale: The scales, as `QuantizedTensor` has them: those of the rows if the spec has `scale_bits`. `params`
            returns the scales of groups for every spec.
        scale_codes: The packed codes of scales, as `QuantizedTensor` has them.
        zero_point: The packed zero points, as `QuantizedTensor` has them.
        input_scale: The scale of static int8 inputs, as `QuantizedTensor` has it.
        spec: The spec of the codes.
        layout: How the weight was cut.
        name: The name of the layout in tables and exported programs.
        data: The names of the tensors that hold the codes.
        by_row: The names of those whose first axis runs over the rows, if the layout can be cut between any two rows.
    """

    name: ClassVar[str]
    data: ClassVar[tuple[str, ...]]
    by_row: ClassVar[tuple[str, ...]] = ()

    scale: Tensor
    scale_codes: Tensor | None = None
    zero_point: Tensor | None = None
    input_scale: Tensor | None = None
    spec: QuantSpec
    layout: Layout

    @classmethod
    def register(cls) -> None:
        """Make this layout known by its name.

        `fewbits.set_compute` registers the layouts of its kernels. Call it before running a program that
        `torch.export` made in another process with a layout of your own.

        Raises:
            ArgumentError: If the class has no name or no data, or shares one with another layout.
        """
        name, data = getattr(cls, "name", ""), getattr(cls, "data", ())
        if WEIGHT_LAYOUTS.get(name) is cls:
            return
        if not name or not data or not set(data) <= attrs.fields_dict(cls).keys():
            raise ArgumentError(
                f"the weight layout {cls.__name__} needs a name, and data: the names of the fields that hold its codes"
            )
        for other in WEIGHT_LAYOUTS.values():
            is_redefined = (other.__module__, other.__qualname__) == (cls.__module__, cls.__qualname__)
            if not is_redefined and (other.name == name or not set(other.data).isdisjoint(data)):
                raise ArgumentError(
                    f"the weight layout {cls.__name__} ({name}: {', '.join(data)}) shares a name with "
                    f"{other.__name__} ({other.name}: {', '.join(other.data)}); rename it or its fields"
                )
        WEIGHT_LAYOUTS[name] = cls

    @classmethod
    def refuses(cls, weight: WeightLayout) -> str | None:
        """Say why this layout cannot hold a weight; None if it can. By default, it holds every weight."""
        return None

    @classmethod
    @abstractmethod
    def of(cls, weight: WeightLayout, *, reuse_memory: bool = False) -> WeightLayout:
        """Convert a weight to this layout.

        Args:
            weight: The weight, in any layout.
            reuse_memory: Whether the new tensors may overwrite the words of `weight`. The C library does not reuse
                freed blocks of their size for aligned allocations.
        """

    @abstractmethod
    def codes(self, where: Rows) -> Tensor:
        """Return the unsigned codes of some rows: uint8, (rows, columns)."""

    def data_of(self, rows: slice) -> dict[str, Tensor | None] | None:
        """Return the tensors in `data` for some rows; they share memory. None if the layout cannot be cut there."""
        held = {name: getattr(self, name) for name in self.data}
        return held | {name: held[name][rows] for name in self.by_row} if self.by_row else None

    def words(self) -> Tensor:
        """Return the canonical words: int32, (rows, words); see `fewbits.numerics.packing`."""
        rows, columns = self.layout.matrix_shape
        words = self.scale.new_empty((rows, packed_words(columns, self.spec.bits)), dtype=torch.int32)
        for where in row_slices(rows, block_rows(columns)):
            words[where] = pack(self.codes(where), self.spec.bits)
        return words

    def value(self, dtype: torch.dtype) -> QuantizedTensor:
        """Return the canonical value of a weight of `dtype`."""
        return QuantizedTensor(packed=self.words(), dtype=dtype, **self.shared())

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors of this layout, by field."""
        held = {name: getattr(self, name) for name in (*self.data, *_SHARED_TENSORS)}
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    def shared(self) -> dict[str, Any]:
        """Return the fields that all layouts of one weight share, for the constructor of another layout."""
        return {field: getattr(self, field) for field in _SHARED}

    def signed_codes(self, where: Rows) -> Tensor:
        """Return the signed codes of some rows, of 8 bits: int8, (rows, columns). They may share memory."""
        return (self.codes(where) ^ 128).view(torch.int8)

    def decoded(self, where: Rows) -> Tensor:
        """Decode some rows: (rows, columns), in float32 (float64 for float64 scales)."""
        return decode(self.codes(where), self.params(where), self.spec, compute_dtype(self.scale.dtype))

    def params(self, where: Rows) -> QuantParams:
        """Return the scale and the unpacked zero point of some rows."""
        return unpack_params(self.scale, self.scale_codes, self.zero_point, self.spec).rows(where)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Decode the weight in float32 (float64 for float64 scales), in its own shape, and cast it to `dtype`."""
        scale = self.scale
        at_once = dtype == compute_dtype(scale.dtype) or math.prod(self.layout.shape) <= BLOCK_ELEMENTS
        if at_once or is_observed(scale) or scale.device.type != "cpu":
            return self.layout.from_matrix(narrow(self.decoded(slice(None)), dtype))
        # New pages for the whole weight in float32 would cost more than all else.
        rows, columns = self.layout.matrix_shape
        matrix = scale.new_empty((rows, columns), dtype=dtype)
        for where in row_slices(rows, block_rows(columns)):
            matrix[where] = narrow(self.decoded(where), dtype)
        return self.layout.from_matrix(matrix)

    def centered_codes(self) -> Tensor:
        """Return codes minus zero points: float64, in the weight's own shape."""
        return self.layout.from_matrix(centered_codes(self.codes(slice(None)), self.params(slice(None)), self.spec))


@attrs.define(eq=False, kw_only=True)
class PackedInt32(WeightLayout):
    """The canonical layout, as in files: codes of any width in int32 words, row after row."""

    name = "packed_int32"
    data = by_row = ("packed",)

    packed: Tensor

    @classmethod
    def of(cls, weight: WeightLayout, *, reuse_memory: bool = False) -> PackedInt32:
        """Convert a weight to words; a weight that has words keeps its tensors."""
        return cls(packed=weight.words(), **weight.shared())

    @classmethod
    def of_value(cls, value: QuantizedTensor) -> PackedInt32:
        """Wrap a value; it shares the tensors."""
        return cls(packed=value.packed, **{field: getattr(value, field) for field in _SHARED})

    def words(self) -> Tensor:
        """Return the words themselves."""
        return self.packed

    def codes(self, where: Rows) -> Tensor:
        """Return the unsigned codes of some rows."""
        return unpack(taken(self.packed, where), self.spec.bits, self.layout.columns)

    def signed_codes(self, where: Rows) -> Tensor:
        """Return the signed codes of some rows, of 8 bits, in new memory."""
        words = taken(self.packed, where)
        signed = (words.contiguous().reshape(-1) ^ HIGHEST_BITS).view(torch.int8)
        return signed.view(len(words), 4 * words.shape[1])[:, : self.layout.columns]

    def decoded(self, where: Rows) -> Tensor:
        """Decode some rows; symmetric codes of 8 bits with a scale for each row need no offset."""
        is_simple = has_byte_rows(self.spec) and not torch.compiler.is_compiling()
        return decoded_bytes(self, where) if is_simple else super().decoded(where)


def has_byte_rows(spec: QuantSpec) -> bool:
    """Whether codes are symmetric integers of 8 bits with one scale for a row or for the tensor."""
    return spec.bits == 8 and spec.levels is None and spec.symmetric and spec.granularity != "group"


def decoded_bytes(weight: WeightLayout, where: Rows) -> Tensor:
    """Decode some rows of a weight that `has_byte_rows` accepts, as `WeightLayout.decoded` does."""
    scale = weight.scale if weight.scale.dim() == 1 else taken(weight.scale, where)
    scale = scale.to(compute_dtype(scale.dtype))
    numbers = weight.signed_codes(where).to(scale.dtype)
    return numbers * scale if is_observed(scale) else numbers.mul_(scale)


def taken(rows: Tensor, where: Rows) -> Tensor:
    """Select rows; an index must lie within them, as in an embedding."""
    return rows.index_select(0, where) if isinstance(where, Tensor) else rows[where]


def looked_up(table: Tensor, index: Tensor) -> Tensor:
    """Look up every element of an index in a table of one axis."""
    return table.index_select(0, index.reshape(-1).to(torch.int32)).view(index.shape)


def round_up(count: int, multiple: int) -> int:
    """Round up to the next multiple."""
    return -(-count // multiple) * multiple


def refuses_any(weight: WeightLayout, *, takes_levels: bool = False) -> str | None:
    """Say why kernels for matrices on the CPU cannot compute with a weight; None if they may.

    Args:
        weight: The weight, in any layout.
        takes_levels: Whether codes may be indices of levels.
    """
    if weight.scale.device.type != "cpu":
        return f"the weight is on {weight.scale.device}, not on the CPU"
    if weight.spec.levels is not None and not takes_levels:
        return "its codes are indices of levels, not integers"
    if weight.layout != Layout.of(weight.layout.shape) or len(weight.layout.shape) != 2:
        return f"it is not a matrix of outputs by inputs, but of shape {weight.layout.shape}"
    if weight.scale.dtype == torch.float64:
        return "it has float64 scales, which need float64 products"
    if not weight.layout.rows * weight.layout.columns:
        return "it has no elements"
    return None


def refuses_padding(weight: WeightLayout, multiple: int) -> str | None:
    """Refuse rows that are so short that padding them to a multiple of this many columns more than doubles them."""
    rows, columns = weight.layout.matrix_shape
    if round_up(columns, multiple) > 2 * columns:
        return f"padded to {multiple}, {rows} rows of {columns} would take more than twice the memory"
    return None


def reused_memory(weight: WeightLayout, reuse_memory: bool, *shape: int) -> Tensor:
    """Return uninitialized bytes of this shape: the memory of the weight's words, if allowed and of that size."""
    words = weight.packed if reuse_memory and isinstance(weight, PackedInt32) else None
    if words is not None and words.is_contiguous() and words.nbytes == math.prod(shape) and not words.is_inference():
        return words.view(-1).view(torch.uint8).view(shape)
    return weight.scale.new_empty(shape, dtype=torch.uint8)


def row_slices(count: int, step: int) -> Iterator[slice]:
    """Cut `count` rows into slices of at most `step`."""
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


PackedInt32.register()
