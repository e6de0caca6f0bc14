"""The noise of rounding and clipping, by which scales are compared.

Noise is in units of the squared scale, of shape (rows, groups, width) unless a docstring gives another one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.numerics.grid import broadcast, in_steps, levels_of, nearest_step, shifted_ends
from fewbits.numerics.params import QuantParams
from fewbits.numerics.spec import QuantSpec

#: As many levels as codes of 4 bits have.
_FEW = 16


def rounding_noise(x: Tensor, params: QuantParams, spec: QuantSpec) -> Tensor:
    """Return the squared error of each element from rounding and clipping."""
    steps = in_steps(x, params.scale, spec)
    if spec.levels is None or len(spec.levels) > _FEW:
        return steps.sub_(_rounded(steps, params.zero_point, spec)).square_()
    # Only the least distance is needed: with few levels, finding it is faster than finding the nearest level.
    least = torch.full_like(steps, torch.inf)
    for level in spec.levels:
        torch.minimum(least, (steps - level).abs_(), out=least)
    return least.square_()


def expected_noise(x: Tensor, params: QuantParams, spec: QuantSpec) -> Tensor:
    """Return the mean of `rounding_noise` over elements of about this size.

    - Outside the range of the codes: the square of the clipped part.
    - For an element so small that it rounds to zero: the square of the element.
    - Otherwise: the square of the distance between neighbouring steps, over 12.
    """
    steps = in_steps(x, params.scale, spec)
    first, last = (broadcast(end) for end in shifted_ends(params, spec, steps.dtype))
    beyond = torch.maximum(steps - last, first - steps)
    below, above = -0.5, 0.5
    inside = torch.full_like(steps, 1 / 12)
    if spec.levels is not None:
        levels, zero = levels_of(spec, steps), spec.levels.index(0.0)
        below, above = spec.levels[zero - 1] / 2, spec.levels[zero + 1] / 2
        inside = (levels.diff().square() / 12)[torch.bucketize(steps.contiguous(), levels[1:-1])]
    noise = torch.where(beyond > 0, beyond.square_(), inside)
    return torch.where((steps > below) & (steps < above), steps.square_(), noise)


def bin_noise(lower: Tensor, upper: Tensor, params: QuantParams, spec: QuantSpec) -> Tensor:
    """Return the mean of `rounding_noise` over values that are spread evenly between two bounds.

    Args:
        lower: the lower bounds of the bins, (1, bins), float64.
        upper: the upper bounds, (1, bins), float64, larger than `lower`.
        params: one scale, (1,).
        spec: a spec of granularity "tensor", without levels.
    """
    bounds = in_steps(lower, params.scale, spec), in_steps(upper, params.scale, spec)
    integrals = [_integral(steps, _rounded(steps, params.zero_point, spec)) for steps in bounds]
    return (integrals[1] - integrals[0]) / (bounds[1] - bounds[0])


def fit_terms(x: Tensor, params: QuantParams, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Return two terms of each element, in units of the scale: element times step, and step squared; for `refit`."""
    steps = in_steps(x, params.scale, spec)
    rounded = _rounded(steps, params.zero_point, spec)
    return steps.mul_(rounded), rounded.square()


def _rounded(steps: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> Tensor:
    """Round to the nearest steps."""
    return nearest_step(steps, None if zero_point is None else broadcast(zero_point.to(steps.dtype)), spec)


def _integral(steps: Tensor, rounded: Tensor) -> Tensor:
    """Return the integral of `rounding_noise` from 0 to `steps`: 1/12 for every whole step, plus the remaining part."""
    return rounded / 12 + (steps - rounded) ** 3 / 3


def group_sums(values: Tensor) -> Tensor:
    """Return the sums along the last axis, in float64; overwrite the values.

    Adds the halves of a group, element by element, until one element is left. The number of terms alone decides the
    order of the sum: not threads, not the instruction set.
    """
    width = values.shape[-1]
    while width > 1:
        half = width // 2
        values.narrow(-1, 0, half).add_(values.narrow(-1, width - half, half))
        width -= half
    return values[..., 0].double()
