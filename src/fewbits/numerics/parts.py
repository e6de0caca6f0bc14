"""The parts of a quantized tensor, as files and state dicts hold them: names, shapes, and packed parameters."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from fewbits.errors import FormatError
from fewbits.numerics.layout import Layout
from fewbits.numerics.packing import pack, packed_words, unpack
from fewbits.numerics.params import QuantParams, group_scales, nearest_parts
from fewbits.numerics.spec import QuantSpec


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


def check_names(found: Collection[str], expected: Collection[str], spec: QuantSpec) -> None:
    """Refuse parts other than the expected ones.

    Raises:
        FormatError: if a part is missing, or there are others.
    """
    if set(found) != set(expected):
        raise FormatError(f"a tensor in {spec} must have the parts {sorted(expected)}, not {sorted(found)}")


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
