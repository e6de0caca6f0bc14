"""Fit levels to weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fewbits.errors import ArgumentError
from fewbits.numerics.grid import grouped
from fewbits.numerics.layout import Layout, WeightMatrix
from fewbits.numerics.quantize import check_finite
from fewbits.numerics.spec import QuantSpec

#: Weights between -1 and 1 are counted at so many steps, and one more. -1, 0 and 1 are among them.
_STEPS = 1 << 14

#: The most rounds of Lloyd's algorithm.
_ROUNDS = 1000


@torch.no_grad()
def fit_levels(weights: Iterable[Tensor], bits: int = 4, group_size: int = 64) -> tuple[float, ...]:
    """Fit levels to weights, so that the mean square of the rounding errors is small.

    Each group is divided by its largest magnitude and counted in a histogram. Then each level is moved to the mean of
    what rounds to it (Lloyd's algorithm) until no level moves. -1, 0 and 1 always stay levels, so that the scale of a
    group is its largest magnitude. The result does not depend on the order of the weights or the number of threads.

    Args:
        weights: floating tensors, whose last axis is cut into groups.
        bits: of a code.
        group_size: neighbouring elements that share a scale.

    Returns:
        ``2**bits`` levels, for `fewbits.schemes.LevelsGrouped` or ``QuantSpec(levels=...)``.

    Raises:
        ArgumentError: if there is no weight, or another argument is not allowed.
        NonFiniteError: if a weight holds NaN or Inf.

    >>> fit_levels([torch.tensor([[-1.0, 0.0, 0.25, 0.25, 1.0]])], bits=2)
    (-1.0, 0.0, 0.25, 1.0)
    """
    spec, counts = QuantSpec(bits, "group", group_size=group_size), torch.zeros(_STEPS + 1, dtype=torch.int64)
    for weight in weights:
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise ArgumentError(f"levels are fitted to floating tensors, not to {getattr(weight, 'dtype', weight)}")
        check_finite(weight)
        counts += _counts(weight, spec)
    if not counts.any():
        raise ArgumentError("levels are fitted to at least one weight; there is none")
    return tuple((_moved(counts, bits) * 2 / _STEPS - 1).tolist())


def _counts(weight: Tensor, spec: QuantSpec) -> Tensor:
    """Count the elements of a weight, each divided by the largest magnitude of its group, at `_STEPS` + 1 steps."""
    counts = torch.zeros(_STEPS + 1, dtype=torch.int64)
    for _, _, rows in WeightMatrix(weight, Layout.of(weight.shape)).blocks():
        groups = grouped(rows.double(), spec)
        largest = groups.abs().amax(-1, keepdim=True)
        steps = ((groups / largest.clamp(min=torch.finfo(groups.dtype).tiny) + 1) * (_STEPS / 2)).round()
        counts += torch.bincount(steps.flatten().to(torch.int64), minlength=_STEPS + 1).cpu()
    return counts


def _moved(counts: Tensor, bits: int) -> Tensor:
    """Move levels to the means of what rounds to them; return them in steps, float64."""
    middle, below = _STEPS // 2, 2 ** (bits - 1)
    spread = [torch.linspace(0, middle, below), torch.linspace(middle, _STEPS, below + 1)[1:]]
    levels = torch.cat(spread).double()
    fixed = (levels == 0) | (levels == middle) | (levels == _STEPS)
    # Sums of integers are exact in any order. `sums[i]` is the sum over the first i steps.
    terms = torch.stack([counts, counts * torch.arange(len(counts))])
    sums = torch.nn.functional.pad(terms.cumsum(1), (1, 0))
    for _ in range(_ROUNDS):
        borders = ((levels[1:] + levels[:-1]) / 2).ceil().to(torch.int64)
        edges = torch.cat([borders.new_zeros(1), borders, borders.new_full((1,), len(counts))])
        number, moment = sums[:, edges].diff()
        means = torch.where(fixed | (number == 0), levels, moment / number)
        if torch.equal(means, levels):
            break
        levels = means
    return levels
