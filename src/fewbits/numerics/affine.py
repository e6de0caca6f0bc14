"""The arithmetic of codes: encode, decode, and bound the error.

All functions work on a block of whole rows. `x` is (rows, columns) and floating. `scale` and `zero_point` are
(rows, groups), or (1,) where one pair serves the whole tensor. A code ``q`` decodes to ``(q - zero_point) * scale``.
If the spec has levels, ``q`` decodes to ``levels[q - code_min] * scale``; see `fewbits.numerics.grid`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.numerics.dtypes import compute_dtype
from fewbits.numerics.grid import (
    broadcast,
    code_range,
    grouped,
    half_gap,
    in_steps,
    level_table,
    nearest_level,
    step_rounder,
)
from fewbits.numerics.params import QuantParams
from fewbits.numerics.scratch import Scratch
from fewbits.numerics.spec import INPUT_SPEC, QuantSpec


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
    if spec.granularity != "group":  # a scale for a row, or for all of them, fits as it is
        return _scaled(codes, params.zero_point, params.scale.to(dtype), spec)
    zero_point = None if params.zero_point is None else broadcast(params.zero_point)
    values = _scaled(grouped(codes, spec), zero_point, broadcast(params.scale.to(dtype)), spec)
    return values.flatten(1)[:, : codes.shape[1]].contiguous()


def _scaled(codes: Tensor, zero_point: Tensor | None, scale: Tensor, spec: QuantSpec) -> Tensor:
    """Decode codes with parameters that fit their shape, in the dtype of `scale`."""
    steps = _steps(codes, zero_point, spec, scale)
    # In place where nobody traces or differentiates this: a second large block of memory may cost more than all else.
    return steps * scale if is_observed(scale) else steps.mul_(scale)


def _steps(codes: Tensor, zero_point: Tensor | None, spec: QuantSpec, scale: Tensor) -> Tensor:
    """Return what multiplies the scale, in new memory."""
    dtype = scale.dtype
    if spec.levels is not None:
        table = level_table(spec, dtype, codes.device)
        return table.index_select(0, codes.reshape(-1).to(torch.int32)).view(codes.shape)
    if zero_point is None and not torch.compiler.is_compiling():
        # Subtracting in int8, which wraps around, is faster than in floats. Exporters cannot view uint8 as int8.
        return (codes.view(torch.int8) + spec.code_min).to(dtype)
    offset = -spec.code_min if zero_point is None else zero_point - spec.code_min
    steps = codes.to(dtype)
    return steps - offset if is_observed(scale) else steps.sub_(offset)


def is_observed(scale: Tensor) -> bool:
    """Whether a compiler traces, a transform of torch.func is active, or the scale has a gradient."""
    if torch.compiler.is_compiling() or scale.requires_grad:
        return True
    return torch._C._functorch.maybe_current_level() is not None


class ColumnRounder:
    """Rounds a matrix column by column, to the numbers that `encode` and `decode` give.

    Args:
        params: the parameters of the rows: (rows, groups), or (1,).
        spec: the spec of the codes.
        dtype: float32 or float64, of the columns.
    """

    def __init__(self, params: QuantParams, spec: QuantSpec, dtype: torch.dtype) -> None:
        scale = _by_group(params.scale)
        divisors = scale.to(torch.promote_types(dtype, compute_dtype(scale.dtype)))
        self._nearest = step_rounder(spec, divisors)
        self._divisors = divisors.unbind()
        self._factors = scale.to(dtype).unbind()
        self._zero_points = None if params.zero_point is None else _by_group(params.zero_point).unbind()

    def round(self, column: Tensor, group: int, out: Tensor) -> None:
        """Round the elements of a column that belong to a group; with one scale for the tensor, to 0.

        Args:
            column: (rows,).
            group: the index of the group.
            out: (rows,), for the result.
        """
        zero_point = None if self._zero_points is None else self._zero_points[group]
        steps = self._nearest(column / self._divisors[group], zero_point)
        torch.mul(steps.to(out.dtype), self._factors[group], out=out)


def _by_group(values: Tensor) -> Tensor:
    """Reshape (rows, groups) to (groups, rows), and (1,) to (1, 1)."""
    return values.reshape(1, 1) if values.dim() == 1 else values.mT.contiguous()


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


def encode_input(x: Tensor, scale: Tensor) -> Tensor:
    """Round inputs to int8 codes, returned as whole numbers in the inputs' floating dtype (NaN stays NaN)."""
    return (x / scale).round().clamp(INPUT_SPEC.code_min, INPUT_SPEC.code_max)


def clip_input(x: Tensor, scale: Tensor) -> Tensor:
    """Clip inputs to the range of int8 codes with this scale."""
    return x.clamp(INPUT_SPEC.code_min * scale, INPUT_SPEC.code_max * scale)


def lowest_values(scale: Tensor, spec: QuantSpec) -> Tensor:
    """Return the number that the lowest code of a symmetric spec decodes to, for each scale, in the scales' dtype."""
    return scale * spec.code_min


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
