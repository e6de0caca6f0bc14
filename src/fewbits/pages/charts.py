"""Histograms and curves as coordinates for SVG."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence

import attrs
import torch
from torch import Tensor

#: Bins of a histogram: an odd number, so that zero is in the middle of one.
_BINS = 61

#: A histogram reaches to this multiple of the root of the mean square: a few outliers would hide all others.
_SPAN = 4.0

#: Width and height of the drawings, and the room around a curve: left, right, top, bottom.
_WIDE, _HIGH = 305, 90
CURVE_SIZE = (460, 280)
_MARGINS = (56, 20, 16, 30)

#: The look of a drawing that stands alone.
_STYLE = (
    "text{font:11px system-ui,sans-serif;fill:#333}.grid{stroke:#ccc}.line{fill:none;stroke:#1f5fbf;stroke-width:2}"
    "circle{fill:#c0392b}@media(prefers-color-scheme:dark){text{fill:#ddd}.grid{stroke:#555}.line{stroke:#7fb0ff}}"
)

#: Numbers that differ by less, or by a smaller share of the largest, get one mark: the labels of several would be the
#: same.
_FLAT, _FLAT_SHARE = 1e-100, 1e-12

#: A curve whose errors differ by more than this factor gets a logarithmic axis.
_LOGARITHMIC = 30


@attrs.frozen
class Histogram:
    """Counts of numbers, in equal bins around zero.

    Attributes:
        span: the bins reach from `-span` to `span`.
        largest: the largest magnitude.
        rms: the root of the mean square.
        counts: one count for each bin.
        beyond: the share of numbers outside of all bins, in percent.
    """

    span: float
    largest: float
    rms: float
    counts: Sequence[int]
    beyond: float

    @classmethod
    def of(cls, pieces: Callable[[], Iterable[Tensor]]) -> Histogram | None:
        """Count numbers; None if one is NaN or infinite, or there are none.

        Args:
            pieces: yields the numbers; it is called twice.
        """
        found = [_moments(piece) for piece in pieces() if piece.numel()]
        square, elements = sum(square for _, square, _ in found), sum(count for *_, count in found)
        if not elements or not math.isfinite(square):
            return None
        largest, rms = max(largest for largest, *_ in found), math.sqrt(square / elements)
        span = min(largest, _SPAN * rms) or 1.0
        counts = torch.zeros(_BINS, dtype=torch.float64)
        for piece in pieces():
            counts += torch.histc(piece.double().flatten() / span, _BINS, -1, 1)
        return cls(span, largest, rms, tuple(map(int, counts.tolist())), 100 * (1 - float(counts.sum()) / elements))

    @property
    def path(self) -> str:
        """The outline for SVG, in a box of 305 x 90."""
        step, highest = _WIDE / _BINS, max(self.counts) or 1
        heights = [round(_HIGH - _HIGH * count / highest, 1) for count in self.counts]
        return f"M0 {_HIGH}" + "".join(f"V{y:g}h{step:g}" for y in heights) + f"V{_HIGH}z"


def _moments(piece: Tensor) -> tuple[float, float, int]:
    """Return the largest magnitude, the sum of squares and the number of elements."""
    numbers = piece.double()
    return float(numbers.abs().max()), float(numbers.square().sum()), numbers.numel()


@attrs.frozen
class Mark:
    """A labelled position in a drawing."""

    x: float
    y: float
    label: str


@attrs.frozen
class CurveChart:
    """A drawn curve of size and error.

    Attributes:
        label: the name of the errors.
        path: the line, for SVG.
        across: marks on the axis of sizes.
        up: marks on the axis of errors.
        marks: the points that have a name.
        named: for each of these its name, size and error, as texts.
        right: where the axis of sizes ends.
        points: the number of points.
        logarithmic: whether the axis of errors is logarithmic.
    """

    label: str
    path: str
    across: Sequence[Mark]
    up: Sequence[Mark]
    marks: Sequence[Mark]
    named: Sequence[tuple[str, str, str]]
    right: float
    points: int
    logarithmic: bool

    def to_svg(self) -> str:
        """Return the drawing as a file of its own."""
        width, height = CURVE_SIZE
        title = html.escape(f"{self.label} against size{', logarithmic' if self.logarithmic else ''}")
        lines = [f'<path class="grid" d="M{tick.x} {tick.y}H{self.right}"/>' for tick in self.up]
        errors = [_text(tick, -8, 4, "end") for tick in self.up]
        sizes = [_text(tick, 0, height - 8 - tick.y, "middle") for tick in self.across]
        marks = [f'<circle cx="{mark.x}" cy="{mark.y}" r="4"/>{_text(mark, 8, -6, "start")}' for mark in self.marks]
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{title}">',
            f"<title>{title}</title><style>{_STYLE}</style>",
            *lines,
            *errors,
            *sizes,
            f'<path class="line" d="{self.path}"/>',
            *marks,
            f'<text x="{_MARGINS[0]}" y="12">{title}</text></svg>',
        ]
        return "\n".join(parts) + "\n"


def _text(mark: Mark, right: float, down: float, anchor: str) -> str:
    place = f'x="{mark.x + right}" y="{mark.y + down}" text-anchor="{anchor}"'
    return f"<text {place}>{html.escape(mark.label)}</text>"


@attrs.frozen
class Axis:
    """Maps numbers to positions in a drawing.

    Attributes:
        low: the smallest number.
        high: the largest number.
        start: the position of the smallest.
        stop: the position of the largest.
        logarithmic: whether equal factors have equal lengths.
    """

    low: float
    high: float
    start: float
    stop: float
    logarithmic: bool = False

    def at(self, number: float) -> float:
        """Return the position of a number; the middle if all numbers are equal."""
        low, high, value = (math.log10(n) if self.logarithmic else n for n in (self.low, self.high, number))
        share = (value - low) / (high - low) if high > low else 0.5
        return round(self.start + share * (self.stop - self.start), 1)

    def ticks(self) -> list[float]:
        """Return round numbers along the axis, at most nine; the smallest number alone if all are almost equal."""
        if self.high - self.low < max(_FLAT, _FLAT_SHARE * abs(self.high)):
            return [self.low]
        if self.logarithmic:
            exponents = range(math.floor(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
            factors = (1, 2, 5) if len(exponents) <= 3 else (1,)
            ticks = [factor * 10.0**n for n in exponents[:: len(exponents) // 8 + 1] for factor in factors]
            return [tick for tick in ticks if self.low <= tick <= self.high]
        step = _round_step(self.high - self.low)
        return [step * n for n in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def _round_step(span: float) -> float:
    """Return 1, 2 or 5 times a power of ten, the smallest that is in the span at most five times."""
    unit = 10.0 ** math.floor(math.log10(span / 5))
    return next(step * unit for step in (1, 2, 5, 10, 20) if span / (step * unit) <= 5)


def axes(sizes: Sequence[int], errors: Sequence[float]) -> tuple[Axis, Axis]:
    """Return the axis of sizes and the axis of errors for a curve."""
    width, height = CURVE_SIZE
    left, right, top, bottom = _MARGINS
    low, high = min(errors), max(errors)
    return (
        Axis(min(sizes), max(sizes), left, width - right),
        Axis(low, high, height - bottom, top, logarithmic=low > 0 and high > _LOGARITHMIC * low),
    )
