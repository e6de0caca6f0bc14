"""`Curve`: the least error for each size, over all budgets at once."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from typing import Any

import attrs
import torch

from fewbits.planning.knapsack import Problem, Steps

#: The most points of a curve.
_POINTS = 256


@attrs.frozen
class Point:
    """The least error within a size.

    Attributes:
        bytes: the bytes of all tensors.
        error: the error.
    """

    bytes: int
    error: float


@attrs.frozen
class Curve:
    """The least error for each size, between the smallest result and the one without error.

    Between two points lie results that mix both.

    Attributes:
        points: by rising size.
        label: the meaning of the error.
        chosen: the size and error of the allocation.
    """

    points: tuple[Point, ...]
    label: str
    chosen: Point

    @classmethod
    def of(cls, problem: Problem, kept: int, label: str, chosen: Point) -> Curve:
        """Follow the convex hulls of all options.

        Args:
            problem: the sizes and errors of the options.
            kept: the bytes of all other tensors.
            label: the meaning of the error.
            chosen: the size and error of the allocation.
        """
        steps = Steps.of(problem)
        size, error = problem.total(steps.start)
        sizes = [size, *(size + steps.size.cumsum(0)).tolist()]
        errors = [error, *(error - steps.saved.cumsum(0)).clamp(min=0).tolist()]
        count = min(_POINTS, len(sizes))
        ends = [round(end) for end in torch.linspace(0, len(sizes) - 1, count).tolist()]
        return cls(tuple(Point(kept + round(sizes[end]), errors[end]) for end in ends), label, chosen)

    @property
    def knee(self) -> int:
        """The point from which on more bytes help less: the farthest below the chord of the logarithm of the error."""
        positive = [(point.bytes, math.log(point.error)) for point in self.points if point.error > 0]
        if len(positive) < 3:
            return 0
        (left, high), (right, low) = positive[0], positive[-1]
        width, height = right - left or 1, high - low or 1.0
        below = [(high - y) / height - (x - left) / width for x, y in positive]
        return below.index(max(below))

    def to_dict(self) -> dict[str, Any]:
        """Return the curve as JSON-compatible values."""
        points = [attrs.asdict(point) for point in self.points]
        return {"error": self.label, "points": points, "knee": self.knee, "chosen": attrs.asdict(self.chosen)}

    def to_json(self) -> str:
        """Return the curve as a JSON document."""
        return json.dumps(self.to_dict(), indent=2)

    def to_svg(self) -> str:
        """Draw the curve: megabytes against the logarithm of the error, with the knee and the allocation marked."""
        return _svg(self)


#: The size of the drawing, and the margins of its axes, in pixels.
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 640, 400, 80, 60, 30

_STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#333}line{stroke:#ccc}polyline{fill:none;stroke:#1f5fbf;stroke-width:2}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}line{stroke:#555}polyline{stroke:#7fb0ff}}"
)


def _svg(curve: Curve) -> str:
    drawn = [point for point in curve.points if point.error > 0] or [curve.chosen]
    places = _Places([point.bytes / 1e6 for point in drawn], [math.log10(point.error or 1) for point in drawn])
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(places.of, drawn))
    marks = [(curve.points[curve.knee], "knee"), (curve.chosen, "chosen")]
    title = f"{curve.label} against megabytes, from {drawn[0].bytes / 1e6:.4g} to {drawn[-1].bytes / 1e6:.4g} MB"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{title}">',
        f"<title>{title}</title><style>{_STYLE}</style>",
        *places.axes(curve.label),
        f'<polyline points="{line}"/>',
        *(_mark(*places.of(point), name) for point, name in marks if point.error > 0),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _mark(x: float, y: float, name: str) -> str:
    circle = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="#c0392b"/>'
    return f'{circle}<text x="{x + 9:.1f}" y="{y - 7:.1f}">{name}</text>'


class _Places:
    """Places of points in the drawing: megabytes to the right, logarithms of errors upwards."""

    def __init__(self, sizes: Sequence[float], logarithms: Sequence[float]) -> None:
        self._x, self._y = _range(sizes), _range(logarithms)

    def of(self, point: Point) -> tuple[float, float]:
        """Return the place of a point."""
        return self._across(point.bytes / 1e6), self._up(math.log10(point.error))

    def axes(self, label: str) -> list[str]:
        """Draw the lines of a grid with their figures, and the labels of both axes."""
        grid = []
        for size in _ticks(*self._x):
            x = self._across(size)
            grid.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>')
            grid.append(f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 20}" text-anchor="middle">{size:.4g}</text>')
        for logarithm in _ticks(*self._y):
            y = self._up(logarithm)
            grid.append(f'<line x1="{_LEFT}" x2="{_WIDTH - 20}" y1="{y:.1f}" y2="{y:.1f}"/>')
            grid.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{10**logarithm:.2g}</text>')
        below = f'<text x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 15}" text-anchor="middle">megabytes</text>'
        return [*grid, below, f'<text x="10" y="{_TOP - 12}">{label}</text>']

    def _across(self, size: float) -> float:
        return _LEFT + (size - self._x[0]) / (self._x[1] - self._x[0]) * (_WIDTH - 20 - _LEFT)

    def _up(self, logarithm: float) -> float:
        return _HEIGHT - _BOTTOM - (logarithm - self._y[0]) / (self._y[1] - self._y[0]) * (_HEIGHT - _BOTTOM - _TOP)


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers between two numbers."""
    raw = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw)
    first = math.ceil(low / step)
    return [number * step for number in itertools.takewhile(lambda n: n * step <= high, itertools.count(first))]
