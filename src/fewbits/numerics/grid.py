"""The numbers that codes can represent: steps, the first and last step, and the nearest step.

A step is a decoded code divided by its scale: the code less its zero point, or one of the spec's levels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.numerics.dtypes import compute_dtype
from fewbits.numerics.params import QuantParams
from fewbits.numerics.scratch import Scratch
from fewbits.numerics.spec import QuantSpec


def grouped(x: Tensor, spec: QuantSpec) -> Tensor:
    """Reshape (rows, columns) to (rows, groups, width); zeros pad a shorter last group."""
    rows, columns = x.shape
    width, groups = spec.width(columns), spec.groups(columns)
    if groups * width != columns:
        x = F.pad(x, (0, groups * width - columns))
    return x.reshape(rows, groups, width)


def broadcast(params: Tensor) -> Tensor:
    """Reshape scales or zero points, (rows, groups) or (1,), to broadcast against the result of `grouped`."""
    return params.reshape(1, 1, 1) if params.dim() == 1 else params.unsqueeze(-1)


def in_steps(x: Tensor, scale: Tensor, spec: QuantSpec, scratch: Scratch | None = None) -> Tensor:
    """Divide elements by their scale, grouped, in the dtype that codes are computed in."""
    dtype = torch.promote_types(compute_dtype(x.dtype), compute_dtype(scale.dtype))
    groups = grouped(x.to(dtype), spec)
    out = None if scratch is None else scratch.take("steps", groups.shape, dtype, x.device)
    return torch.div(groups, broadcast(scale.to(dtype)), out=out)


def ends(spec: QuantSpec) -> tuple[float, float]:
    """Return the first and the last step, before zero points are subtracted."""
    return (spec.code_min, spec.code_max) if spec.levels is None else (spec.levels[0], spec.levels[-1])


def shifted_ends(params: QuantParams, spec: QuantSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the first and the last step for each scale; both are scalars if there are no zero points."""
    (first, last), zero_point = ends(spec), params.zero_point
    zero = params.scale.new_zeros((), dtype=dtype) if zero_point is None else zero_point.to(dtype)
    return first - zero, last - zero


def end_gaps(spec: QuantSpec) -> tuple[float, float]:
    """Return half the distance between the first two steps, and between the last two."""
    if spec.levels is None:
        return 0.5, 0.5
    return (spec.levels[1] - spec.levels[0]) / 2, (spec.levels[-1] - spec.levels[-2]) / 2


def levels_of(spec: QuantSpec, like: Tensor) -> Tensor:
    """Return the levels of a spec that has levels, as a tensor."""
    return torch.tensor(spec.levels, dtype=like.dtype, device=like.device)


def level_table(spec: QuantSpec, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the level of each code, lowest code first; NaN for an invalid code."""
    return torch.tensor([*(spec.levels or ()), *[torch.nan] * spec.invalid_codes], dtype=dtype, device=device)


def _middles(spec: QuantSpec, like: Tensor) -> Tensor:
    """Return the numbers half-way between neighbouring levels."""
    middles = [(low + high) / 2 for low, high in pairwise(spec.levels or ())]
    return torch.tensor(middles, dtype=like.dtype, device=like.device)


def nearest_level(steps: Tensor, spec: QuantSpec) -> Tensor:
    """Return the index of the nearest level, int32."""
    return torch.bucketize(steps.contiguous(), _middles(spec, steps), out_int32=True)


def step_rounder(spec: QuantSpec, like: Tensor) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Return a function that rounds real numbers, in units of the scale, to the nearest step.

    Its second argument is the zero point, which must broadcast against the first; None for a symmetric spec.

    Args:
        spec: the spec of the codes.
        like: has the dtype and device of the numbers.
    """
    if spec.levels is None:
        return partial(_nearest_integer, *ends(spec))
    return partial(_nearest_of, levels_of(spec, like), _middles(spec, like))


def _nearest_integer(first: float, last: float, steps: Tensor, zero_point: Tensor | None) -> Tensor:
    if zero_point is None:
        return steps.round().clamp_(first, last)
    return (steps.round() + zero_point).clamp_(first, last) - zero_point


def _nearest_of(levels: Tensor, middles: Tensor, steps: Tensor, _: Tensor | None) -> Tensor:
    index = torch.bucketize(steps.contiguous(), middles, out_int32=True)
    return levels.index_select(0, index.view(-1)).view(steps.shape)


def nearest_step(steps: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> Tensor:
    """Round to the nearest step; see `step_rounder`."""
    return step_rounder(spec, steps)(steps, zero_point)


def half_gap(x: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    """Return half the distance between the two representable numbers around each element (grouped)."""
    step = broadcast(scale.double())
    if spec.levels is None:
        return step.abs() / 2
    levels = levels_of(spec, step)
    above = torch.bucketize((grouped(x, spec) / step).contiguous(), levels).clamp(1, len(levels) - 1)
    return (levels[above] - levels[above - 1]) * step.abs() / 2


def code_range(params: QuantParams, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest representable number (grouped, float64); scales may be negative."""
    bounds = [broadcast(end * params.scale.double()) for end in shifted_ends(params, spec, torch.float64)]
    return torch.minimum(*bounds), torch.maximum(*bounds)
