"""The arithmetic of codes: choose scale and zero point, encode, decode, and bound the error.

All functions work on a block of whole rows. `x` is (rows, columns) and floating. `scale` and `zero_point` are
(rows, groups), or (1,) where one pair serves the whole tensor. A code ``q`` decodes to ``(q - zero_point) * scale``.
If the spec has levels, ``q`` decodes to ``levels[q - code_min] * scale``; see `fewbits.numerics.grid`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewbits.errors import RangeError
from fewbits.numerics.dtypes import POWERS_OF_TWO, compute_dtype, dtype_name
from fewbits.numerics.grid import (
    broadcast,
    code_range,
    end_gaps,
    ends,
    grouped,
    half_gap,
    in_steps,
    level_table,
    nearest_level,
    nearest_step,
    shifted_ends,
)
from fewbits.numerics.params import QuantParams
from fewbits.numerics.scratch import Scratch
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

    Thus a power of two is the smallest one with which nothing lies more than half a step beyond the last code. The rule
    of the OCP Microscaling formats, ``2**floor(log2(largest) - log2(last))`` with the last power of two among the
    levels, may clip by more: a largest magnitude of almost 8 steps decodes to 6 in MXFP4.

    Args:
        low: the lower ends, at most zero; any shape.
        high: the upper ends, at least zero; the shape of `low`.
        spec: the spec of the codes, with `scale_dtype` set.

    Returns:
        scale in ``spec.scale_dtype``, and zero point in int32 or None, in the shape of `low`.

    Raises:
        RangeError: if a scale is beyond the largest number of its dtype.
    """
    low, high = low.double(), high.double()
    exact = _exact_scale(low, high, spec)
    scale = _stored(exact, spec)
    # Without zero points and levels, the largest magnitude is at most 127 steps. Rounding a scale to a dtype with a
    # mantissa moves 127 steps by less than half a step, so nothing clips.
    if not spec.symmetric or spec.levels is not None or scale.dtype == POWERS_OF_TWO:
        scale = torch.where(_clips(low, high, scale, spec), _next_up(scale), scale)
    if not _far_from_overflow(scale, spec):
        scale = _without_overflow(low, high, scale, spec)
        if not torch.isfinite(scale).all():
            worst = float(torch.maximum(-low, high).max())
            raise RangeError(
                f"magnitudes up to {worst:.6g} need a scale of {float(exact.max()):.6g}, beyond the largest "
                f"{dtype_name(scale.dtype)} ({torch.finfo(scale.dtype).max:.6g}); "
                "pass a wider scale_dtype, or keep this tensor"
            )
    return QuantParams(scale, None if spec.symmetric else _zero_point(low, scale, spec).to(torch.int32))


def encode(x: Tensor, params: QuantParams, spec: QuantSpec, scratch: Scratch | None = None) -> Tensor:
    """Round to the nearest code, clamped to the code range.

    Args:
        x: (rows, columns).
        params: the parameters of these rows.
        spec: the spec of the codes.
        scratch: memory for intermediate results and for the result, which the next use of `scratch` overwrites.

    Returns:
        uint8, the shape of `x`: codes made unsigned by adding ``2**(bits-1)``.
    """
    scratch = scratch or Scratch()
    steps = in_steps(x, params.scale, spec, scratch)
    if spec.levels is not None:
        codes = nearest_level(steps, spec).to(torch.uint8)
    else:
        steps.round_()
        if params.zero_point is not None:
            steps += broadcast(params.zero_point)
        steps.clamp_(spec.code_min, spec.code_max)
        # Convert to signed bytes and shift them afterwards: torch converts floats to unsigned bytes much more slowly.
        codes = scratch.take("codes", steps.shape, torch.int8, x.device).copy_(steps).view(torch.uint8)
        codes += -spec.code_min
    return codes.flatten(1)[:, : x.shape[1]]


def decode(codes: Tensor, params: QuantParams, spec: QuantSpec, dtype: torch.dtype) -> Tensor:
    """Turn codes back into numbers, computed in `dtype`.

    Args:
        codes: uint8, (rows, columns), unsigned as `encode` returns them.
        params: the parameters of these rows.
        spec: the spec of the codes.
        dtype: float32 or float64.
    """
    # torch.compile and torch.export trace this function, so it uses no in-place operation.
    scale, zero_point = params.scale, params.zero_point
    if spec.levels is not None:
        steps = (
            level_table(spec, dtype, codes.device)
            .index_select(0, codes.reshape(-1).to(torch.int32))
            .reshape(codes.shape)
        )
        values = grouped(steps, spec) * broadcast(scale.to(dtype))
    else:
        offset = -spec.code_min if zero_point is None else broadcast(zero_point) - spec.code_min
        values = (grouped(codes, spec).to(dtype) - offset) * broadcast(scale.to(dtype))
    return values.flatten(1)[:, : codes.shape[1]].contiguous()


def bound_and_clipped(x: Tensor, params: QuantParams, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Bound the error of each element, its largest allowed distance from its decoded code, and mark clipped elements.

    The bound is ``gap + |x| * 2**-23``, in float64. ``gap`` is

    - ``scale / 2`` for integer codes;
    - half the distance between the two levels around the element, for codes with levels;
    - the distance to the code range, if that is larger: an observer clipped the element;
    - the distance to the farther end of the code range, if ``spec.rounding`` is "free".

    Args:
        x: float64, (rows, columns).
        params: the stored scales, and the unpacked zero points.
        spec: the spec of the codes.

    Returns:
        the bounds; and whether each element lies more than half a step outside the code range.
    """
    groups, gap = grouped(x, spec), half_gap(x, params.scale, spec)
    low, high = code_range(params, spec)
    above, below = groups - high, low - groups
    beyond = torch.maximum(above, below)  # at most zero inside the range
    farthest = -torch.minimum(above, below) if spec.rounding == "free" else torch.maximum(beyond, gap)
    bound = farthest + groups.abs() * 2.0**-23
    outside = beyond > gap
    return bound.flatten(1)[:, : x.shape[1]], outside.flatten(1)[:, : x.shape[1]]


def _exact_scale(low: Tensor, high: Tensor, spec: QuantSpec) -> Tensor:
    """Return the smallest scale whose codes cover `low` and `high`, before it is rounded to its dtype."""
    first, last = ends(spec)
    if not spec.symmetric:
        # Divide first: the difference of `high` and `low` may overflow.
        return high / (last - first) - low / (last - first)
    # Integer codes use a symmetric range. Only observers that search for a scale make use of the lowest code.
    return torch.maximum(-low, high) / last if spec.levels is None else torch.maximum(low / first, high / last)


def _stored(exact: Tensor, spec: QuantSpec) -> Tensor:
    dtype = spec.scale_dtype or exact.dtype
    return exact.clamp(min=torch.finfo(dtype).tiny).to(dtype)


def _zero_point(low: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    """Return zero points as whole float64 numbers; zeros for a symmetric spec."""
    if spec.symmetric:
        return torch.zeros_like(low)
    return (spec.code_min - low / scale.double()).round_().clamp_(spec.code_min, spec.code_max)


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
    limit = torch.finfo(compute_dtype(scale.dtype)).max
    factor = 2.0 if scale.dtype == POWERS_OF_TWO else _OVERFLOW_FACTOR
    for _ in range(_OVERFLOW_STEPS):
        zero_point, step = _zero_point(low, scale, spec), scale.double()
        first, last = (nearest_step(end / step, zero_point, spec) for end in (low, high))
        overflows = torch.isfinite(step) & (torch.maximum(last, -first) * step > limit)
        if not overflows.any():
            break
        scale = torch.where(overflows, _stored(step * factor, spec), scale)
    return scale


def _next_up(x: Tensor) -> Tensor:
    """Return the next larger representable number of a positive one."""
    return (x.view(_SAME_WIDTH_INT[x.element_size()]) + 1).view(x.dtype)


def dynamic_scale(x: Tensor, dims: Sequence[int]) -> Tensor:
    """Compute the scale of int8 inputs from the inputs themselves: their largest magnitude over 127.

    Args:
        x: float32 or float64; NaN and Inf make the scale NaN or Inf, and the output with it.
        dims: the axes that share one scale; the result keeps them with length 1.
    """
    return (x.abs().amax(tuple(dims), keepdim=True) / INPUT_SPEC.code_max).clamp(min=torch.finfo(x.dtype).tiny)


def encode_input(x: Tensor, scale: Tensor) -> Tensor:
    """Round inputs to int8 codes, returned as whole numbers in the inputs' floating dtype (NaN stays NaN)."""
    return (x / scale).round().clamp(INPUT_SPEC.code_min, INPUT_SPEC.code_max)


def clip_input(x: Tensor, scale: Tensor) -> Tensor:
    """Clip inputs to the range of int8 codes with this scale."""
    return x.clamp(INPUT_SPEC.code_min * scale, INPUT_SPEC.code_max * scale)


def centered_codes(codes: Tensor, params: QuantParams, spec: QuantSpec) -> Tensor:
    """Return the codes minus their zero points, in float64.

    Args:
        codes: uint8, (rows, columns), unsigned as `encode` returns them.
        params: the parameters of these rows.
        spec: the spec of the codes.
    """
    ones = torch.ones_like(params.scale, dtype=torch.float64)
    return decode(codes, QuantParams(ones, params.zero_point), spec, torch.float64)


def largest_sum(products: int, spec: QuantSpec) -> int:
    """Return the largest magnitude of a sum of `products` terms, each an int8 input times a centered code."""
    largest_step = -spec.code_min if spec.symmetric else spec.code_max - spec.code_min
    return products * largest_step * -INPUT_SPEC.code_min


def refit(scale: Tensor, products: Tensor, squares: Tensor, spec: QuantSpec) -> Tensor:
    """Fit the scale to codes that are already chosen, by least squares: ``sum(x * step) / sum(step**2)``.

    Args:
        scale: the scale that the codes were chosen with, as stored.
        products: sums of the first result of `fewbits.numerics.noise.fit_terms`, float64, the shape of `scale`.
        squares: sums of the second result of `fit_terms`, in the same form.
        spec: the spec of the codes, with `scale_dtype` set.
    """
    factor = torch.where(squares > 0, products / squares, 1.0)
    fitted = _stored(scale.double().abs() * factor, spec)
    return fitted if scale.dtype == POWERS_OF_TWO else fitted.copysign(scale)  # powers of two have no sign


def is_finite_throughout(params: QuantParams, spec: QuantSpec) -> Tensor:
    """Tell for each scale whether every code decodes to a finite number."""
    first, last = shifted_ends(params, spec, torch.float64)
    limit = torch.finfo(compute_dtype(params.scale.dtype)).max
    return torch.maximum(last, -first) * params.scale.double().abs() <= limit
