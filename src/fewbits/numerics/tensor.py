"""`QuantizedTensor`: codes and scales, exactly as files store them."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from fewbits.errors import FormatError
from fewbits.numerics.affine import decode
from fewbits.numerics.dtypes import FLOAT_DTYPES, POWERS_OF_TWO, compute_dtype, dtype_name
from fewbits.numerics.layout import Layout
from fewbits.numerics.packing import pack, packed_words, unpack
from fewbits.numerics.params import QuantParams, check_params
from fewbits.numerics.parts import (
    check_input_scale,
    check_names,
    check_shape_part,
    pack_params,
    part_shapes,
    shape_part,
    unpack_params,
)
from fewbits.numerics.plain import plain
from fewbits.numerics.spec import QuantSpec


@attrs.frozen(eq=False, repr=False)
class QuantizedTensor:
    """A tensor of any shape as packed integer codes.

    Attributes:
        packed: int32, (rows, words), the packed codes of the (rows, columns) matrix that `layout` describes; see
            `fewbits.numerics.packing`.
        scale: (rows, groups), or (1,) for granularity "tensor", in ``spec.scale_dtype``. With two levels of scales
            (``spec.scale_bits``), the scales of the rows: (rows, 1); `params` returns those of the groups.
        zero_point: int32, packed along the rows: (words, groups); None if symmetric.
        spec: the spec of the codes.
        layout: the layout that cut the tensor into rows and columns; it has the shape of the tensor.
        dtype: the dtype of the tensor that was quantized; `dequantize` returns this dtype by default.
        input_scale: float32, (1,), the scale of the layer's int8 inputs; None unless ``spec.activations`` is "static".
        scale_codes: int32, the codes of the groups' scales, packed along the rows: (words, groups); None unless there
            are two levels of scales.
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None
    spec: QuantSpec
    layout: Layout
    dtype: torch.dtype
    input_scale: Tensor | None = None
    scale_codes: Tensor | None = None

    def __attrs_post_init__(self) -> None:
        """Refuse parts that do not fit each other.

        Raises:
            FormatError: if a part is missing, or its shape or dtype does not fit spec and layout.
        """
        if self.dtype not in FLOAT_DTYPES:
            raise FormatError(f"{dtype_name(self.dtype)} is not a dtype that a weight can have")
        expected = part_shapes(self.layout, self.spec, self.dtype)
        found = self._tensors()
        check_names([*found, "shape"], expected, self.spec)
        del expected["shape"]  # `layout` holds it
        for name, (shape, dtype) in expected.items():
            if (tuple(found[name].shape), found[name].dtype) != (shape, dtype):
                raise FormatError(
                    f"{name} has shape {tuple(found[name].shape)} and dtype {dtype_name(found[name].dtype)}; a tensor "
                    f"of shape {self.layout.shape} in {self.spec} needs {shape} and {dtype_name(dtype)}"
                )
        if self.input_scale is not None and not self.input_scale.is_meta:
            check_input_scale(self.input_scale)

    def __reduce__(self) -> tuple[Any, ...]:
        fields = attrs.asdict(self, recurse=False)
        if self.scale.dtype == POWERS_OF_TWO:  # pickle refuses tensors of this dtype
            fields["scale"] = self.scale.view(torch.uint8)
        return _unpickled, (fields,)

    def __repr__(self) -> str:
        return (
            f"QuantizedTensor({self.spec}, shape={self.shape}, dtype={dtype_name(self.dtype)}, {self.nbytes:,} bytes)"
        )

    @classmethod
    def from_codes(
        cls, codes: Tensor, params: QuantParams, *, spec: QuantSpec, layout: Layout, dtype: torch.dtype
    ) -> QuantizedTensor:
        """Pack signed codes.

        Args:
            codes: integer, (rows, columns), in the code range of `spec`.
            params: scales in ``spec.scale_dtype`` (any dtype if that is None), and zero points if asymmetric.
            spec: the spec of the codes.
            layout: the layout that cut the tensor into rows and columns.
            dtype: the dtype of the tensor that was quantized.
        """
        spec = spec.for_dtype((params.scale if params.row_scale is None else params.row_scale).dtype)
        params = check_params(params, spec, layout.matrix_shape)
        if tuple(codes.shape) != layout.matrix_shape or codes.is_floating_point():
            raise FormatError(
                f"codes must be integers of shape {layout.matrix_shape}, "
                f"not {dtype_name(codes.dtype)} of {tuple(codes.shape)}"
            )
        if codes.numel() and not spec.code_min <= int(codes.min()) <= int(codes.max()) <= spec.code_max:
            raise FormatError(f"codes of {spec} must lie between {spec.code_min} and {spec.code_max}")
        packed = pack((codes.to(torch.int16) - spec.code_min).to(torch.uint8), spec.bits)
        return cls(packed, spec=spec, layout=layout, dtype=dtype, **pack_params(params, spec))

    @classmethod
    def from_parts(
        cls, parts: Mapping[str, Tensor], *, spec: QuantSpec, layout: Layout, dtype: torch.dtype
    ) -> QuantizedTensor:
        """Build a quantized tensor from the tensors that `parts` returns, without copying them.

        Raises:
            FormatError: if a part is missing, or does not fit spec and layout.
        """
        check_names(parts, part_shapes(layout, spec, dtype), spec)
        check_shape_part(parts["shape"], layout.shape)
        optional = {name: parts.get(name) for name in ("zero_point", "input_scale", "scale_codes")}
        return cls(parts["packed"], parts["scale"], spec=spec, layout=layout, dtype=dtype, **optional)

    def parts(self) -> dict[str, Tensor]:
        """Return the tensors of a file.

        They are packed, scale, scale_codes (two levels of scales), zero_point (asymmetric), input_scale (static) and
        shape (int64).
        """
        return self._tensors() | {"shape": shape_part(self.layout.shape)}

    def _tensors(self) -> dict[str, Tensor]:
        """Return all parts but the shape."""
        optional = {
            "scale_codes": self.scale_codes,
            "zero_point": self.zero_point,
            "input_scale": self.input_scale,
        }
        parts = {"packed": self.packed, "scale": self.scale}
        return parts | {name: part for name, part in optional.items() if part is not None}

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor that was quantized."""
        return self.layout.shape

    @property
    def nbytes(self) -> int:
        """The number of bytes of all parts, as stored."""
        return sum(part.nbytes for part in self.parts().values())

    def zero_points(self) -> Tensor | None:
        """Return the unpacked zero points, int32, one for each scale; None if symmetric."""
        return self.params().zero_point

    def params(self) -> QuantParams:
        """Return the scales and the zero points of all groups, unpacked."""
        return unpack_params(self.scale, self.scale_codes, self.zero_point, self.spec)

    def codes(self) -> Tensor:
        """Return the signed codes: int8, (rows, columns)."""
        unsigned = unpack(self.packed, self.spec.bits, self.layout.columns)
        return (unsigned.to(torch.int16) + self.spec.code_min).to(torch.int8)

    def has_valid_codes(self) -> bool:
        """Tell whether every code has a level, or the spec has no levels. Other codes decode to NaN."""
        if not self.spec.invalid_codes or not self.packed.numel():
            return True
        return int(self.codes().max()) <= self.spec.code_max

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Decode the tensor into its original shape, computed in float32 (float64 for float64 scales).

        Args:
            dtype: the dtype to cast the result to; None means the source's dtype.
        """
        codes = unpack(self.packed, self.spec.bits, self.layout.columns)
        matrix = decode(codes, self.params(), self.spec, compute_dtype(self.scale.dtype))
        return self.layout.from_matrix(narrow(matrix, dtype or self.dtype))

    def rows(self, start: int, stop: int) -> QuantizedTensor:
        """Return some rows of the matrix as a quantized tensor of two dimensions over the same memory.

        Args:
            start: the first row; if there are zero points or two levels of scales, a multiple of 32, where a packed
                word of them begins.
            stop: the row after the last one.
        """
        rows, spec = slice(start, stop), self.spec
        per_row = spec.granularity != "tensor"

        def words(packed: Tensor | None, bits: int | None) -> Tensor | None:
            if packed is None or bits is None or not per_row:
                return packed
            return packed[start * bits // 32 : packed_words(stop, bits)]

        return attrs.evolve(
            self,
            packed=self.packed[rows],
            scale=self.scale[rows] if per_row else self.scale,
            zero_point=words(self.zero_point, spec.bits),
            scale_codes=words(self.scale_codes, spec.scale_bits),
            layout=Layout.of((len(self.packed[rows]), self.layout.columns)),
        )

    def equal(self, other: QuantizedTensor) -> bool:
        """Tell whether spec, layout, dtype and all parts are equal, bit for bit."""
        mine, theirs = self.parts(), other.parts()
        return (self.spec, self.layout, self.dtype) == (other.spec, other.layout, other.dtype) and all(
            same_bits(mine[name], theirs[name]) for name in mine
        )


def same_bits(a: QuantizedTensor | Tensor, b: QuantizedTensor | Tensor) -> bool:
    """Tell whether two stored tensors are equal bit for bit; NaN equals itself."""
    if isinstance(a, QuantizedTensor) or isinstance(b, QuantizedTensor):
        return isinstance(a, QuantizedTensor) and isinstance(b, QuantizedTensor) and a.equal(b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(_as_bytes(in_memory(a)), _as_bytes(in_memory(b))) if a.numel() else True


def _as_bytes(tensor: Tensor) -> Tensor:
    """View a contiguous tensor as bytes."""
    # A tensor of one element may have any stride, and `view` to another dtype would refuse most strides.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def in_memory(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor in CPU memory with conjugation and negation resolved; not a copy if it already is one.

    Raises:
        SourceError: if it is not a plain tensor, because its data pointer would not be valid.
    """
    tensor = plain(tensor)
    if tensor.is_cpu and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg()):
        return tensor
    return tensor.resolve_conj().resolve_neg().cpu().contiguous()


def narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast to `dtype`; numbers that would round to Inf become its largest number, since the source held no Inf."""
    if x.dtype == dtype:
        return x
    limit = torch.finfo(dtype).max
    return (x.clamp(-limit, limit) if limit < torch.finfo(x.dtype).max else x).to(dtype)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor in CPU memory, not copied; they live as long as the tensor does."""
    if not tensor.nbytes:
        return memoryview(b"")
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def _unpickled(fields: dict[str, Any]) -> QuantizedTensor:
    """Undo `QuantizedTensor.__reduce__`."""
    if fields["scale"].dtype == torch.uint8 and POWERS_OF_TWO is not None:
        fields["scale"] = fields["scale"].view(POWERS_OF_TWO)
    return QuantizedTensor(**fields)
