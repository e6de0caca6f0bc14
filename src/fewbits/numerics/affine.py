"""The affine maths, in one copy: choose scale and zero point, encode, decode, and the bound on the error.

All functions work on a block of whole rows: `x` is (rows, columns) and floating, `scale` and `zero_point` are
(rows, groups), or (1,) where one pair serves the whole tensor. A code ``q`` stands for ``(q - zero_point) * scale``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.errors import NumericsError, RangeError
from fewbits.numerics.dtypes import compute_dtype, dtype_name
from fewbits.numerics.spec import QuantSpec

_SAME_WIDTH_INT = {2: torch.int16, 4: torch.int32, 8: torch.int64}

#: Each step moves the quotient of a magnitude and its scale by a sixteenth, past the half that rounds up, at last.
_OVERFLOW_STEPS, _OVERFLOW_FACTOR = 16, 17 / 16


def extremes(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The smallest and the largest element of each group, zero included.

    Returns:
        two tensors of the scales' shape, in the dtype of `x`.
    """
    groups = _grouped(x, spec)
    dims = (0, 1, 2) if spec.granularity == "tensor" else (2,)
    shape = spec.scale_shape(*x.shape)
    return groups.amin(dims).clamp(max=0).reshape(shape), groups.amax(dims).clamp(min=0).reshape(shape)


def choose_params(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """The smallest scale, and its zero point, with which everything between `low` and `high` is in range.

    Scales are computed in float64, then rounded to ``spec.scale_dtype``. One below that dtype's smallest normal
    number is raised to it. Where rounding down would clip `low` or `high` the next number up is taken, and where a
    code in use would stand for more than the largest number there is, a larger scale with which none does.

    Args:
        low: at most zero; any shape.
        high: at least zero; the shape of `low`.
        spec: with its `scale_dtype` settled.

    Returns:
        scale in ``spec.scale_dtype``, and zero point in int32 or None, in the shape of `low`.

    Raises:
        RangeError: if a scale is beyond the largest number of its dtype.
    """
    low, high = low.double(), high.double()
    steps = spec.code_max - spec.code_min
    # Each bound is divided on its own: their difference may overflow.
    exact = torch.maximum(-low, high) / spec.code_max if spec.symmetric else high / steps - low / steps
    scale = _stored(exact, spec)
    scale = torch.where(_clips(low, high, scale, spec), _next_up(scale), scale)
    for _ in range(_OVERFLOW_STEPS):
        overflows = _overflows(low, high, scale, spec)
        if not overflows.any():
            break
        scale = torch.where(overflows, _stored(scale.double() * _OVERFLOW_FACTOR, spec), scale)
    if not torch.isfinite(scale).all():
        worst = float(torch.maximum(-low, high).max())
        raise RangeError(
            f"magnitudes up to {worst:.6g} need a scale of {float(exact.max()):.6g}, beyond the largest "
            f"{dtype_name(scale.dtype)} ({torch.finfo(scale.dtype).max:.6g}); "
            "pass a wider scale_dtype, or keep this tensor"
        )
    return scale, None if spec.symmetric else _zero_point(low, scale, spec).to(torch.int32)


def encode(x: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> Tensor:
    """Round to the nearest code, clamped to the code range.

    Returns:
        uint8, the shape of `x`: codes made unsigned by adding ``2**(bits-1)``.
    """
    dtype = torch.promote_types(compute_dtype(x.dtype), compute_dtype(scale.dtype))
    codes = _grouped(x.to(dtype), spec) / _broadcast(scale.to(dtype))
    codes.round_()
    if zero_point is not None:
        codes += _broadcast(zero_point)
    codes.clamp_(spec.code_min, spec.code_max).sub_(spec.code_min)
    return codes.to(torch.uint8).flatten(1)[:, : x.shape[1]]


def decode(codes: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec, dtype: torch.dtype) -> Tensor:
    """What the codes stand for, computed in `dtype`.

    Args:
        codes: uint8, (rows, columns), unsigned as `encode` returns them.
        scale: of the rows that `codes` holds.
        zero_point: likewise, or None.
        spec: the spec they were encoded with.
        dtype: float32 or float64.
    """
    # No in-place operation: this is traced by torch.compile and torch.export.
    offset = -spec.code_min if zero_point is None else _broadcast(zero_point) - spec.code_min
    values = (_grouped(codes, spec).to(dtype) - offset) * _broadcast(scale.to(dtype))
    return values.flatten(1)[:, : codes.shape[1]].contiguous()


def error_bound(x: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> Tensor:
    """How far each element may lie from what its code stands for, when codes are rounded to nearest.

    ``scale / 2 + |x| * 2**-23``; where an observer clips, the distance to the nearest representable value in
    place of ``scale / 2`` (if larger). Evaluated in float64.

    Args:
        x: float64, (rows, columns).
        scale: as stored.
        zero_point: as stored, unpacked; None if symmetric.
        spec: how the codes look.
    """
    bound = torch.maximum(_beyond(x, scale, zero_point, spec), _half_step(scale)) + _grouped(x, spec).abs() * 2.0**-23
    return bound.flatten(1)[:, : x.shape[1]]


def clipped(x: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> Tensor:
    """Which elements lie further than half a step outside what the codes can stand for; arguments as `error_bound`."""
    outside = _beyond(x, scale, zero_point, spec) > _half_step(scale)
    return outside.flatten(1)[:, : x.shape[1]]


def check_params(
    scale: Tensor, zero_point: Tensor | None, spec: QuantSpec, shape: tuple[int, int]
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point for a (rows, columns) block, if codes can be made with them.

    Raises:
        NumericsError: if shape or dtype is not what the spec asks for, a scale is zero, NaN or Inf, or a zero
            point lies outside the code range.
    """
    expected = spec.scale_shape(*shape)
    if not isinstance(scale, Tensor) or not isinstance(zero_point, (Tensor, type(None))):
        raise NumericsError("scales must be a tensor, zero points a tensor or None")
    if tuple(scale.shape) != expected or scale.dtype != spec.scale_dtype:
        raise NumericsError(
            f"scales of shape {tuple(scale.shape)} in {dtype_name(scale.dtype)} for {shape[0]} rows of {shape[1]}; "
            f"{spec} needs shape {expected} in {spec.scale_dtype}"
        )
    if not bool((torch.isfinite(scale) & (scale != 0)).all()):
        raise NumericsError("a scale is zero, NaN or Inf; scales must be finite and not zero")
    if (zero_point is None) != spec.symmetric:
        raise NumericsError(f"there is a zero point exactly where the spec is asymmetric; this is {spec}")
    if zero_point is None:
        return scale, None
    whole = not zero_point.is_floating_point() and zero_point.dtype != torch.bool
    wide = zero_point.to(torch.int64)
    if not whole or tuple(wide.shape) != expected or bool(((wide < spec.code_min) | (wide > spec.code_max)).any()):
        raise NumericsError(
            f"these zero points are not integers of shape {expected} between {spec.code_min} and {spec.code_max}"
        )
    return scale, wide.to(torch.int32)


def _grouped(x: Tensor, spec: QuantSpec) -> Tensor:
    """(rows, columns) as (rows, groups, width); a ragged last group is filled up with zeros."""
    rows, columns = x.shape
    width, groups = spec.width(columns), spec.groups(columns)
    if groups * width != columns:
        x = F.pad(x, (0, groups * width - columns))
    return x.reshape(rows, groups, width)


def _beyond(x: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> Tensor:
    """How far each element lies outside what the codes can stand for (grouped, float64); at most zero inside."""
    step, groups = _broadcast(scale.double()), _grouped(x, spec)
    zero = _broadcast(zero_point.double()) if zero_point is not None else 0.0
    ends = (spec.code_min - zero) * step, (spec.code_max - zero) * step
    return torch.maximum(groups - torch.maximum(*ends), torch.minimum(*ends) - groups)


def _half_step(scale: Tensor) -> Tensor:
    return _broadcast(scale.double().abs() / 2)


def _broadcast(params: Tensor) -> Tensor:
    """(rows, groups) or (1,) as something that broadcasts against `_grouped`."""
    return params.reshape(1, 1, 1) if params.dim() == 1 else params.unsqueeze(-1)


def _stored(exact: Tensor, spec: QuantSpec) -> Tensor:
    dtype = spec.scale_dtype or exact.dtype
    return exact.clamp(min=torch.finfo(dtype).tiny).to(dtype)


def _zero_point(low: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    """In float64, whole numbers; zeros for a symmetric spec."""
    if spec.symmetric:
        return torch.zeros_like(low)
    return (spec.code_min - low / scale.double()).round_().clamp_(spec.code_min, spec.code_max)


def _clips(low: Tensor, high: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    """Whether an end of the range is further than half a step from every code."""
    zero_point, step = _zero_point(low, scale, spec), scale.double()
    return (high > step * (spec.code_max - zero_point + 0.5)) | (low < step * (spec.code_min - zero_point - 0.5))


def _overflows(low: Tensor, high: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    """Whether a code in use stands for more than the largest number of the dtype that decoding computes in."""
    zero_point, step = _zero_point(low, scale, spec), scale.double()
    last = ((high / step).round() + zero_point).clamp(max=spec.code_max) - zero_point
    first = ((low / step).round() + zero_point).clamp(min=spec.code_min) - zero_point
    limit = torch.finfo(compute_dtype(scale.dtype)).max
    return torch.isfinite(step) & (torch.maximum(last, -first) * step > limit)


def _next_up(x: Tensor) -> Tensor:
    """The next representable number above a positive one."""
    return (x.view(_SAME_WIDTH_INT[x.element_size()]) + 1).view(x.dtype)
