"""`QuantizedTensor`: codes and scales, exactly as files store them."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from fewbits.errors import FormatError
from fewbits.numerics.affine import decode
from fewbits.numerics.dtypes import FLOAT_DTYPES, POWERS_OF_TWO, compute_dtype, dtype_name
from fewbits.numerics.layout import Layout
from fewbits.numerics.packing import pack, packed_words, unpack
from fewbits.numerics.params import QuantParams, check_params, group_scales, nearest_parts
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
        _check_names([*found, "shape"], expected, self.spec)
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
        _check_names(parts, part_shapes(layout, spec, dtype), spec)
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


def _check_names(found: Collection[str], expected: Collection[str], spec: QuantSpec) -> None:
    if set(found) != set(expected):
        raise FormatError(f"a tensor in {spec} must have the parts {sorted(expected)}, not {sorted(found)}")


def part_shapes(layout: Layout, spec: QuantSpec, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of every part that a tensor will have once it is quantized.

    >>> spec = QuantSpec(bits=4, granularity="group", group_size=128)
    >>> part_shapes(Layout.of((10, 200)), spec, torch.float16)["scale"]
    ((10, 2), torch.float16)
    """
    rows, columns = layout.matrix_shape
    scale = spec.scale_shape(rows, columns)
    parts = {
        "packed": ((rows, packed_words(columns, spec.bits)), torch.int32),
        "scale": (scale, spec.for_dtype(dtype).scale_dtype or dtype),
        "shape": ((len(layout.shape),), torch.int64),
    }
    if spec.scale_bits is not None:
        parts["scale"] = (rows, 1), parts["scale"][1]
        parts["scale_codes"] = (packed_words(rows, spec.scale_bits), *scale[1:]), torch.int32
    if not spec.symmetric:
        parts["zero_point"] = (packed_words(scale[0], spec.bits), *scale[1:]), torch.int32
    if spec.activations == "static":
        parts["input_scale"] = (1,), torch.float32
    return parts


def shape_part(shape: Sequence[int]) -> Tensor:
    """Return a shape as files store it: int64, one number per axis."""
    return torch.tensor(tuple(shape), dtype=torch.int64, device="cpu")


def check_input_scale(scale: Tensor) -> None:
    """Refuse a scale of inputs, (1,), that is not positive and finite.

    Raises:
        FormatError: if it is not.
    """
    if not 0 < float(scale) < math.inf:
        raise FormatError(f"the scale of inputs is {float(scale)}; it must be positive and finite")


def check_shape_part(part: Tensor, shape: Sequence[int]) -> None:
    """Refuse a stored shape that differs from the layout's shape.

    Raises:
        FormatError: if they differ; the message names both.
    """
    if part.dtype != torch.int64 or part.dim() != 1 or part.tolist() != list(shape):
        raise FormatError(f"the part 'shape' is {tuple(part.flatten().tolist())}, but the layout has {tuple(shape)}")


def pack_params(params: QuantParams, spec: QuantSpec) -> dict[str, Any]:
    """Return scale, scale_codes and zero_point as `QuantizedTensor` has them."""
    scale, codes = params.scale, None
    if params.row_scale is not None and spec.scale_bits is not None:
        parts = nearest_parts(scale, params.row_scale, spec)
        # There is no scale of zero parts, so the codes of positive parts move down by one.
        codes = _pack_down(torch.where(parts > 0, parts - 1, parts) + _negative_parts(spec), spec.scale_bits)
        scale = params.row_scale
    zero_point = None if params.zero_point is None else _pack_down(params.zero_point - spec.code_min, spec.bits)
    return {"scale": scale, "scale_codes": codes, "zero_point": zero_point}


def unpack_params(scale: Tensor, scale_codes: Tensor | None, zero_point: Tensor | None, spec: QuantSpec) -> QuantParams:
    """Undo `pack_params`: return the scales and the zero points of all groups; zero points in int32."""
    row_scale = None
    if scale_codes is not None and spec.scale_bits is not None:
        row_scale = scale
        parts = _unpack_down(scale_codes, spec.scale_bits, len(row_scale)).to(torch.int16) - _negative_parts(spec)
        scale = group_scales(row_scale, parts + (parts >= 0), spec)
    if zero_point is not None:
        codes = _unpack_down(zero_point, spec.bits, scale.shape[0]).to(torch.int32)
        zero_point = (codes + spec.code_min).reshape(scale.shape)
    return QuantParams(scale, zero_point, row_scale)


def _negative_parts(spec: QuantSpec) -> int:
    return spec.scale_parts if spec.symmetric else 0


def _pack_down(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes, (rows, ...), along the rows: int32, (words, ...)."""
    packed = pack(codes.to(torch.uint8).reshape(codes.shape[0], -1).T.contiguous(), bits).T.contiguous()
    return packed.reshape(-1, *codes.shape[1:])


def _unpack_down(packed: Tensor, bits: int, rows: int) -> Tensor:
    """Undo `_pack_down`: uint8, (rows, columns)."""
    # `contiguous` would keep the stride of a single word, which could then not be viewed as bytes; `clone` resets it.
    columns = packed.reshape(packed.shape[0], -1).T.clone(memory_format=torch.contiguous_format)
    return unpack(columns, bits, rows).T


def narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast to `dtype`; numbers that would round to Inf become its largest number, since the source held no Inf."""
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
