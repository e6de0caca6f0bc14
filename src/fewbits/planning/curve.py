"""The least error for each size, over all budgets at once."""

from __future__ import annotations

import math

import torch

from fewbits.pages.curve import Curve
from fewbits.planning.knapsack import Problem, Steps

#: The most points of a curve.
_POINTS = 256


def curve_of(problem: Problem, kept: int, label: str, chosen: tuple[int, float]) -> Curve:
    """Follow the convex hulls of all options, from the smallest result to the most exact one.

    Between two points lie results that mix both.

    Args:
        problem: the sizes and errors of the options.
        kept: the bytes of all other tensors.
        label: the meaning of the error.
        chosen: the bytes and the error of an allocation.
    """
    steps = Steps.of(problem)
    size, error = problem.total(steps.start)
    sizes = [size, *(size + steps.size.cumsum(0)).tolist()]
    errors = [error, *(error - steps.saved.cumsum(0)).clamp(min=0).tolist()]
    count = min(_POINTS, len(sizes))
    ends = [round(end) for end in torch.linspace(0, len(sizes) - 1, count).tolist()]
    points = [(kept + round(sizes[end]), errors[end]) for end in ends]
    named = {"knee": _knee(points), "chosen": chosen}
    return Curve(tuple(sorted({*points, chosen})), named, label)


def _knee(points: list[tuple[int, float]]) -> tuple[int, float]:
    """Return the point from which on more bytes help less.

    It is the point farthest below the straight line between the ends, where the errors have a logarithmic axis.
    """
    positive = [(size, math.log(error)) for size, error in points if error > 0]
    if len(positive) < 3:
        return points[0]
    (left, high), (right, low) = positive[0], positive[-1]
    width, height = right - left or 1, high - low or 1.0
    below = [(high - y) / height - (x - left) / width for x, y in positive]
    return points[below.index(max(below))]
