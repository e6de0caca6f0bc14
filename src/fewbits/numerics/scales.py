"""Choose scales and zero points. No other module computes a scale.

`low` and `high` are the smallest and the largest element of each group, or other ends of a range.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewbits.errors import RangeError
from fewbits.numerics.dtypes import POWERS_OF_TWO, compute_dtype, dtype_name
from fewbits.numerics.grid import end_gaps, ends, grouped, nearest_step, shifted_ends
from fewbits.numerics.params import QuantParams, group_scales, nearest_parts, stored_scale
from fewbits.numerics.spec import INPUT_SPEC, QuantSpec

_SAME_WIDTH_INT = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

#: Each step enlarges the scale by a sixteenth. After at most this many steps the code of a magnitude rounds down.
_OVERFLOW_STEPS, _OVERFLOW_FACTOR = 16, 17 / 16


def extremes(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest element of each group, zero included.

    Returns:
        two tensors of the scales' shape, in the dtype of `x`.
    """
    groups = grouped(x, spec)
    dims = (0, 1, 2) if spec.granularity == "tensor" else (2,)
    shape = spec.scale_shape(*x.shape)
    # `aminmax` takes ten times as long for short groups.
    return groups.amin(dims).clamp_(max=0).view(shape), groups.amax(dims).clamp_(min=0).view(shape)


def choose_params(low: Tensor, high: Tensor, spec: QuantSpec) -> QuantParams:
    """Choose the smallest scale whose codes cover the range from `low` to `high`, and its zero point.

    Scales are computed in float64, then rounded to ``spec.scale_dtype``. The rounded scale is replaced by

    - the smallest normal number of that dtype, if the scale is smaller;
    - the next larger number, if the rounded scale would clip `low` or `high`;
    - a larger scale, if `low` or `high` would decode to infinity.

    With two levels of scales (``spec.scale_bits``), the scale of a row is the largest scale that one of its groups
    would have with one level. Then `choose_in_rows` chooses the scales of the groups.

    A scale that is a power of two is the smallest one with which nothing lies more than half a step beyond the last
    code. The rule of the OCP Microscaling formats, ``2**floor(log2(largest) - log2(last))`` with the last power of two
    among the levels, may clip by more: a largest magnitude of almost 8 steps decodes to 6 in MXFP4.

    Args:
        low: the lower ends, at most zero; any shape, but (rows, groups) for two levels of scales.
        high: the upper ends, at least zero; the shape of `low`.
        spec: the spec of the codes, with `scale_dtype` set.

    Returns:
        scale in ``spec.scale_dtype``, and zero point in int32 or None, in the shape of `low`. With two levels of
        scales, `QuantParams` says which dtype `scale` has.

    Raises:
        RangeError: if a scale is beyond the largest number of its dtype.
    """
    if spec.scale_bits is not None:
        return _in_two_levels(low, high, spec)
    low, high = low.double(), high.double()
    exact = _exact_scale(low, high, spec)
    scale = stored_scale(exact.abs(), spec, None)
    # Without zero points and levels, the largest magnitude is at most 127 steps. Rounding a scale to a dtype with a
    # mantissa moves 127 steps by less than half a step, so nothing clips.
    if not spec.symmetric or spec.levels is not None or scale.dtype == POWERS_OF_TWO:
        scale = torch.where(_clips(low, high, scale, spec), _next_up(scale), scale)
    if not _far_from_overflow(scale, spec):
        scale = _without_overflow(low, high, scale, spec)
        _check_range(low, high, scale, spec)
    return _with_zero_point(low, scale, None, spec)


def choose_in_rows(low: Tensor, high: Tensor, row_scale: Tensor, spec: QuantSpec) -> QuantParams:
    """Choose the scale of each group, with two levels of scales, when the scales of the rows are known.

    Args:
        low: the lower ends, at most zero, (rows, groups).
        high: the upper ends, at least zero, (rows, groups).
        row_scale: (rows, 1), in ``spec.scale_dtype``.
        spec: a spec with two levels of scales, and with `scale_dtype` set.

    Returns:
        for each group the nearest positive scale to the exact one, or the next larger one where the nearest would clip
        `low` or `high`; but none above the scale of the row.
    """
    low, high = low.double(), high.double()
    parts = nearest_parts(_exact_scale(low, high, spec).abs(), row_scale, spec)
    clips = _clips(low, high, group_scales(row_scale, parts, spec), spec)
    scale = group_scales(row_scale, (parts + clips).clamp_(max=spec.scale_parts), spec)
    return _with_zero_point(low, scale, row_scale, spec)


def rounded_up_to_two_levels(params: QuantParams, spec: QuantSpec) -> QuantParams:
    """Replace scales of one level by the next larger ones of two levels, so that no more elements clip than before.

    Args:
        params: scales, (rows, groups), of any floating dtype; positive if the spec is asymmetric.
        spec: a spec with two levels of scales, and with `scale_dtype` set.
    """
    scale = params.scale.double().abs()
    largest = scale.amax(1, keepdim=True)
    row_scale = stored_scale(largest, spec, None)
    row_scale = _large_enough(torch.where(row_scale.double() < largest, _next_up(row_scale), row_scale), spec)
    parts = (scale / row_scale.double() * spec.scale_parts).ceil_().clamp_(1, spec.scale_parts)
    signed = torch.where(params.scale < 0, -parts, parts)
    return QuantParams(group_scales(row_scale, signed, spec), params.zero_point, row_scale)


def dynamic_scale(x: Tensor, dims: Sequence[int]) -> Tensor:
    """Compute the scale of int8 inputs from the inputs themselves: their largest magnitude over 127.

    Args:
        x: float32 or float64; NaN and Inf make the scale NaN or Inf, and the output with it.
        dims: the axes that share one scale; the result keeps them with length 1.
    """
    return (x.abs().amax(tuple(dims), keepdim=True) / INPUT_SPEC.code_max).clamp(min=torch.finfo(x.dtype).tiny)


def refit(params: QuantParams, products: Tensor, squares: Tensor, spec: QuantSpec) -> QuantParams:
    """Fit the scales to codes that are already chosen, by least squares: ``sum(x * step) / sum(step**2)``.

    Args:
        params: the parameters that the codes were chosen with.
        products: sums of the first result of `fewbits.numerics.noise.fit_terms`, float64, the shape of the scales.
        squares: sums of the second result of `fit_terms`, in the same form.
        spec: the spec of the codes, with `scale_dtype` set.
    """
    factor = torch.where(squares > 0, products / squares, 1.0)
    return params.with_scale(params.scale.double() * factor, spec)


def rescaled(params: QuantParams, by_row: Tensor, by_scale: Tensor, spec: QuantSpec) -> QuantParams:
    """Multiply scales by ``exp(by_row + by_scale)``, and round them to what can be stored.

    With two levels of scales, ``exp(by_row)`` also multiplies the scales of the rows. A scale keeps its sign. It also
    keeps its value where the factor is 1, or where a code would decode to infinity.

    Args:
        params: the stored parameters.
        by_row: must broadcast against the scales, one factor for each row.
        by_scale: must broadcast against the scales.
        spec: the spec of the codes.
    """
    row_scale = params.row_scale
    if row_scale is not None:
        multiplied = _large_enough(_multiplied(row_scale, by_row, spec, None), spec)
        row_scale = torch.where(by_row == 0, row_scale, multiplied)
    changed = QuantParams(_multiplied(params.scale, by_row + by_scale, spec, row_scale), params.zero_point, row_scale)
    overflows = ~is_finite_throughout(changed, spec)
    if row_scale is None:
        keep = overflows | ((by_row == 0) & (by_scale == 0))
    else:
        keep = overflows.any(1, keepdim=True)  # the scales of a row go with the scale of the row
    return params.where(keep, changed)


def is_finite_throughout(params: QuantParams, spec: QuantSpec) -> Tensor:
    """Tell for each scale whether every code decodes to a finite number."""
    first, last = shifted_ends(params, spec, torch.float64)
    limit = torch.finfo(compute_dtype(params.scale.dtype)).max
    return torch.maximum(last, -first) * params.scale.double().abs() <= limit


def _in_two_levels(low: Tensor, high: Tensor, spec: QuantSpec) -> QuantParams:
    """Do the work of `choose_params` for two levels of scales."""
    low, high = low.double(), high.double()
    one_level = choose_params(low, high, spec.one_level())
    row_scale = _large_enough(one_level.scale.amax(1, keepdim=True), spec)
    params = choose_in_rows(low, high, row_scale, spec)
    if _far_from_overflow(params.scale, spec):
        return params
    scale = params.scale
    for _ in range(_OVERFLOW_STEPS + 1):
        rows = _overflows(low, high, scale, spec).any(1, keepdim=True)
        if not rows.any():
            break
        # All groups of such a row share its scale. Then only the largest magnitude of the row can overflow.
        enlarged = rows & (scale == row_scale).all(1, keepdim=True)
        row_scale = torch.where(enlarged, stored_scale(row_scale.double() * _OVERFLOW_FACTOR, spec, None), row_scale)
        scale = torch.where(rows, row_scale.to(scale.dtype), scale)
    _check_range(low, high, scale, spec)
    return _with_zero_point(low, scale, row_scale, spec)


def _large_enough(row_scale: Tensor, spec: QuantSpec) -> Tensor:
    """Replace scales of rows so small that a scale of a group would be subnormal."""
    return row_scale.clamp(min=torch.finfo(compute_dtype(row_scale.dtype)).tiny * spec.scale_parts)


def _exact_scale(low: Tensor, high: Tensor, spec: QuantSpec) -> Tensor:
    """Return the smallest scale whose codes cover `low` and `high`, before it is rounded to its dtype."""
    first, last = ends(spec)
    if not spec.symmetric:
        # Divide first: the difference of `high` and `low` may overflow.
        return high / (last - first) - low / (last - first)
    # Integer codes use a symmetric range. Only observers that search for a scale make use of the lowest code.
    return torch.maximum(-low, high) / last if spec.levels is None else torch.maximum(low / first, high / last)


def _zero_point(low: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    """Return zero points as whole float64 numbers; zeros for a symmetric spec."""
    if spec.symmetric:
        return torch.zeros_like(low)
    return (spec.code_min - low / scale.double()).round_().clamp_(spec.code_min, spec.code_max)


def _with_zero_point(low: Tensor, scale: Tensor, row_scale: Tensor | None, spec: QuantSpec) -> QuantParams:
    zero_point = None if spec.symmetric else _zero_point(low, scale, spec).to(torch.int32)
    return QuantParams(scale, zero_point, row_scale)


def _clips(low: Tensor, high: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    """Tell where `low` or `high` is further than half a step from every code."""
    zero_point, step = _zero_point(low, scale, spec), scale.double()
    first, last = ends(spec)
    before, after = end_gaps(spec)
    return (high > step * (last - zero_point + after)) | (low < step * (first - zero_point - before))


def _far_from_overflow(scale: Tensor, spec: QuantSpec) -> bool:
    """Tell whether all codes decode to finite numbers for any zero point."""
    first, last = ends(spec)
    return float(scale.double().max()) * (last - first) <= torch.finfo(compute_dtype(scale.dtype)).max


def _without_overflow(low: Tensor, high: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    """Enlarge each scale with which `low` or `high` would decode to infinity; the scale itself may become Inf."""
    factor = 2.0 if scale.dtype == POWERS_OF_TWO else _OVERFLOW_FACTOR
    for _ in range(_OVERFLOW_STEPS):
        overflows = _overflows(low, high, scale, spec)
        if not overflows.any():
            break
        scale = torch.where(overflows, stored_scale(scale.double() * factor, spec, None), scale)
    return scale


def _overflows(low: Tensor, high: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    """Tell where a finite scale makes `low` or `high` decode to infinity."""
    zero_point, step = _zero_point(low, scale, spec), scale.double()
    first, last = (nearest_step(end / step, zero_point, spec) for end in (low, high))
    limit = torch.finfo(compute_dtype(scale.dtype)).max
    return torch.isfinite(step) & (torch.maximum(last, -first) * step > limit)


def _check_range(low: Tensor, high: Tensor, scale: Tensor, spec: QuantSpec) -> None:
    """Refuse scales that are infinite in the dtype that they are stored in."""
    if torch.isfinite(scale).all():
        return
    worst, exact = float(torch.maximum(-low, high).max()), float(_exact_scale(low, high, spec).max())
    dtype = spec.scale_dtype or scale.dtype
    raise RangeError(
        f"magnitudes up to {worst:.6g} need a scale of {exact:.6g}, beyond the largest "
        f"{dtype_name(dtype)} ({torch.finfo(dtype).max:.6g}); pass a wider scale_dtype, or keep this tensor"
    )


def _next_up(x: Tensor) -> Tensor:
    """Return the next larger representable number of a positive one."""
    return (x.view(_SAME_WIDTH_INT[x.element_size()]) + 1).view(x.dtype)


def _multiplied(scale: Tensor, log_factor: Tensor, spec: QuantSpec, row_scale: Tensor | None) -> Tensor:
    limit = torch.finfo(scale.dtype).max
    return stored_scale((scale.double() * log_factor.double().exp()).clamp(-limit, limit), spec, row_scale)
