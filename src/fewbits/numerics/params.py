"""`QuantParams`: the scale and zero point that codes are made with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import attrs
import torch
from torch import Tensor

from fewbits.errors import NumericsError
from fewbits.numerics.dtypes import FLOAT_DTYPES, POWERS_OF_TWO, compute_dtype, dtype_name
from fewbits.numerics.spec import QuantSpec


# Not frozen: torch.compile cannot trace the `__init__` that attrs writes for frozen classes.
@attrs.define(eq=False)
class QuantParams:
    """Scale and zero point of some rows, or of a whole tensor.

    Attributes:
        scale: (rows, groups), or (1,) where one scale serves the whole tensor. In ``spec.scale_dtype``; with two
            levels of scales (``spec.scale_bits``) in float32, or in float64 if ``spec.scale_dtype`` is float64.
        zero_point: integer, the shape of `scale`; None if symmetric.
        row_scale: with two levels, the scale of each row, (rows, 1) in ``spec.scale_dtype``; else None.
    """

    scale: Tensor
    zero_point: Tensor | None = None
    row_scale: Tensor | None = None

    def rows(self, where: slice | Tensor) -> QuantParams:
        """Return the parameters of some rows; all of them if one scale serves the whole tensor."""
        is_whole = isinstance(where, slice) and where == slice(None)
        return self if self.scale.dim() == 1 or is_whole else self._each(lambda part: part[where])

    def where(self, better: Tensor, other: QuantParams) -> QuantParams:
        """Return these parameters where `better` is true, and the other ones elsewhere.

        Args:
            better: a value for each scale, or for each row; the latter if the two have different scales of rows.
            other: parameters of the same rows.
        """
        zero_point, row_scale = self.zero_point, self.row_scale
        if zero_point is not None and other.zero_point is not None:
            zero_point = torch.where(better, zero_point, other.zero_point)
        if row_scale is not None and other.row_scale is not None:
            row_scale = torch.where(better[:, :1], row_scale, other.row_scale)
        return QuantParams(torch.where(better, self.scale, other.scale), zero_point, row_scale)

    def to(self, device: torch.device) -> QuantParams:
        """Return the parameters on a device."""
        return self._each(lambda part: part.to(device))

    def with_scale(self, scale: Tensor, spec: QuantSpec) -> QuantParams:
        """Return these parameters with other scales, each rounded to the nearest one that can be stored.

        With two levels of scales, the scales of the rows stay.

        Args:
            scale: floating, finite, the shape of the present scales.
            spec: the spec of the codes, with `scale_dtype` set.
        """
        return QuantParams(stored_scale(scale, spec, self.row_scale), self.zero_point, self.row_scale)

    @classmethod
    def joined(cls, parts: Sequence[QuantParams]) -> QuantParams:
        """Join the parameters of consecutive rows; parameters of a whole tensor are all the same."""
        first = parts[0]
        if first.scale.dim() == 1:
            return first
        zero_points = [part.zero_point for part in parts if part.zero_point is not None]
        row_scales = [part.row_scale for part in parts if part.row_scale is not None]
        return cls(
            torch.cat([part.scale for part in parts]),
            torch.cat(zero_points) if zero_points else None,
            torch.cat(row_scales) if row_scales else None,
        )

    def _each(self, change: Callable[[Tensor], Tensor]) -> QuantParams:
        optional = [None if part is None else change(part) for part in (self.zero_point, self.row_scale)]
        return QuantParams(change(self.scale), *optional)


def empty_params(spec: QuantSpec, rows: int, columns: int, device: torch.device) -> QuantParams:
    """Allocate the parameters of a (rows, columns) matrix; `scale_dtype` of the spec is set."""
    shape, dtype = spec.scale_shape(rows, columns), spec.scale_dtype or torch.float32
    two_levels = spec.scale_bits is not None
    return QuantParams(
        torch.empty(shape, dtype=compute_dtype(dtype) if two_levels else dtype, device=device),
        None if spec.symmetric else torch.empty(shape, dtype=torch.int32, device=device),
        torch.empty((rows, 1), dtype=dtype, device=device) if two_levels else None,
    )


def stored_scale(exact: Tensor, spec: QuantSpec, row_scale: Tensor | None) -> Tensor:
    """Round scales to the nearest ones that can be stored; in two levels if rows have scales."""
    if row_scale is not None:
        return group_scales(row_scale, nearest_parts(exact, row_scale, spec), spec)
    dtype = spec.scale_dtype or exact.dtype
    size = exact.abs().clamp(min=torch.finfo(dtype).tiny).to(dtype)
    return size if dtype == POWERS_OF_TWO else torch.where(exact < 0, -size, size)  # powers of two have no sign


def group_scales(row_scale: Tensor, parts: Tensor, spec: QuantSpec) -> Tensor:
    """Return the scales of groups, as parts of the scales of their rows.

    Args:
        row_scale: (rows, 1), in ``spec.scale_dtype``.
        parts: whole numbers up to ``spec.scale_parts``, negative for negative scales, (rows, groups).
        spec: a spec with two levels of scales.

    Returns:
        (rows, groups), in float32 (float64 for float64 scales). Only the product of the two may be rounded.
    """
    dtype = compute_dtype(row_scale.dtype)
    return row_scale.to(dtype) * (parts.to(dtype) / spec.scale_parts)


def nearest_parts(scale: Tensor, row_scale: Tensor, spec: QuantSpec) -> Tensor:
    """Return how many parts of its row's scale are nearest to a group's scale: whole float64 numbers, never zero."""
    ratio = scale.double() / row_scale.double() * spec.scale_parts
    parts = (ratio.abs() if spec.symmetric else ratio).round_().clamp_(1, spec.scale_parts)
    return torch.where(ratio < 0, -parts, parts) if spec.symmetric else parts


def magnitudes(scale: Tensor) -> Tensor:
    """Return the magnitudes of scales, in a dtype that torch computes with."""
    return scale.abs() if scale.dtype in FLOAT_DTYPES else scale.float()


def are_sound(scale: Tensor) -> bool:
    """Tell whether all scales are finite and not zero."""
    if not scale.numel():
        return True
    least, largest = torch.aminmax(magnitudes(scale))  # both are NaN if one scale is NaN
    return float(least) > 0 and float(largest) < math.inf


def check_params(params: object, spec: QuantSpec, shape: tuple[int, int]) -> QuantParams:
    """Return the parameters for a (rows, columns) block, with zero points in int32.

    Raises:
        NumericsError: if codes cannot be made with them: not a `QuantParams`, another shape or dtype than the spec
            needs, a scale that is zero, NaN or Inf, or that two levels of scales cannot store, or a zero point outside
            the code range.
    """
    if not isinstance(params, QuantParams):
        raise NumericsError(f"scale and zero point come as QuantParams(scale, zero_point), not {type(params).__name__}")
    scale, zero_point = params.scale, params.zero_point
    expected = spec.scale_shape(*shape)
    if not isinstance(scale, Tensor) or not isinstance(zero_point, (Tensor, type(None))):
        raise NumericsError("scales must be a tensor, zero points a tensor or None")
    _check_two_levels(params, spec, shape[0])
    dtype = spec.scale_dtype if spec.scale_bits is None else compute_dtype(spec.scale_dtype or scale.dtype)
    if tuple(scale.shape) != expected or scale.dtype != dtype:
        raise NumericsError(
            f"scales of shape {tuple(scale.shape)} in {dtype_name(scale.dtype)} for {shape[0]} rows of {shape[1]}; "
            f"{spec} needs shape {expected} in {dtype}"
        )
    if not are_sound(scale):
        raise NumericsError("a scale is zero, NaN or Inf; scales must be finite and not zero")
    if params.row_scale is not None:
        _check_group_scales(scale, params.row_scale, spec)
    if (zero_point is None) != spec.symmetric:
        raise NumericsError(f"asymmetric specs need zero points, symmetric specs must have none; this spec is {spec}")
    if zero_point is None:
        return params
    whole = not zero_point.is_floating_point() and zero_point.dtype != torch.bool
    wide = zero_point.to(torch.int64)
    if not whole or tuple(wide.shape) != expected or bool(((wide < spec.code_min) | (wide > spec.code_max)).any()):
        raise NumericsError(
            f"these zero points are not integers of shape {expected} between {spec.code_min} and {spec.code_max}"
        )
    return QuantParams(scale, wide.to(torch.int32), params.row_scale)


def _check_two_levels(params: QuantParams, spec: QuantSpec, rows: int) -> None:
    """Refuse scales of rows that the spec does not have, or that do not fit it."""
    row_scale = params.row_scale
    if (row_scale is None) != (spec.scale_bits is None):
        raise NumericsError(
            f"specs with scale_bits need a row_scale, other specs must have none; this spec is {spec}. Change scales "
            "with params.with_scale(scale, spec), which keeps the row_scale"
        )
    if row_scale is None:
        return
    if not isinstance(row_scale, Tensor) or (tuple(row_scale.shape), row_scale.dtype) != ((rows, 1), spec.scale_dtype):
        raise NumericsError(
            f"the row_scale of {rows} rows in {spec} must be a tensor of ({rows}, 1) in {spec.scale_dtype}"
        )
    if not are_sound(row_scale) or bool((row_scale < 0).any()):
        raise NumericsError("the scale of a row is not positive and finite")


def _check_group_scales(scale: Tensor, row_scale: Tensor, spec: QuantSpec) -> None:
    if not torch.equal(stored_scale(scale, spec, row_scale), scale):
        signs = "of either sign" if spec.symmetric else "and positive"
        raise NumericsError(
            f"a scale is not a whole number of {spec.scale_parts}ths of its row's scale, from 1 to {spec.scale_parts} "
            f"{signs}; change scales with params.with_scale(scale, spec)"
        )
