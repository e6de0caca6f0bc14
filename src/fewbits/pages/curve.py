"""`Curve`: the sizes that a checkpoint could have, each with its error, as ``fewbits allocate`` writes them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from fewbits.checkpoint.header import parse_json
from fewbits.checkpoint.raw import as_checkpoint_error
from fewbits.errors import FormatError
from fewbits.pages.charts import CurveChart, Mark, axes
from fewbits.pages.content import size_in_words

_NAMED = ("knee", "chosen")

#: Larger errors are refused, so that differences between errors are finite.
_MOST = 1e100


@attrs.frozen
class Curve:
    """A curve of size and quality.

    Attributes:
        points: pairs of bytes and error, by rising bytes.
        named: points with a name: "knee", "chosen".
        error: the name of the errors.
    """

    points: tuple[tuple[int, float], ...]
    named: Mapping[str, tuple[int, float]]
    error: str

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Curve:
        """Read ``{"points": [{"bytes": int, "error": float}, ...], "knee": index, "chosen": index, "error": label}``.

        The two indices may be null or missing. Other keys are ignored.

        Raises:
            CheckpointError: if the file cannot be read.
            FormatError: if it has another form.
        """
        with as_checkpoint_error(f"{path} cannot be read"):
            fields = parse_json(Path(path).read_bytes(), path, "curve")
        if not isinstance(fields, dict) or not isinstance(fields.get("points"), list) or not fields["points"]:
            raise FormatError(f"{path}: a curve is an object with a list of points, at least one; see docs/report.md")
        points = [_point(point, path) for point in fields["points"]]
        named = {name: points[_index(fields[name], name, points, path)] for name in _NAMED if _given(fields, name)}
        label = fields.get("error", "error")
        if not isinstance(label, str):
            raise FormatError(f"{path}: error is the name of the errors, a text, not {label!r}")
        return cls(tuple(sorted(points)), named, label)

    def to_dict(self) -> dict[str, Any]:
        """Return the curve as JSON-compatible values, which `read` takes."""
        points = [{"bytes": size, "error": error} for size, error in self.points]
        return {
            "error": self.error,
            "points": points,
            **{name: self.points.index(point) for name, point in self.named.items()},
        }

    def to_json(self) -> str:
        """Return the curve as a JSON document."""
        return json.dumps(self.to_dict(), indent=2)

    def to_svg(self) -> str:
        """Return a drawing of the curve that stands alone: sizes to the right, errors upwards."""
        return self.drawn().to_svg()

    def drawn(self) -> CurveChart:
        """Return the curve as coordinates."""
        sizes, errors = zip(*self.points, strict=True)
        across, up = axes(sizes, errors)
        places = list(dict.fromkeys((across.at(size), up.at(error)) for size, error in self.points))
        points: dict[tuple[int, float], list[str]] = {}
        for name, point in self.named.items():
            points.setdefault(point, []).append(name)
        ends = {"smallest": self.points[0], "largest": self.points[-1]}
        return CurveChart(
            label=self.error,
            path="M" + "L".join(f"{x:g} {y:g}" for x, y in places),
            across=[Mark(across.at(size), up.start, size_in_words(round(size))) for size in across.ticks()],
            up=[Mark(across.start, up.at(error), f"{error:.3g}") for error in up.ticks()],
            marks=[Mark(across.at(size), up.at(error), ", ".join(names)) for (size, error), names in points.items()],
            named=[(name, f"{size:,}", f"{error:.4g}") for name, (size, error) in (ends | dict(self.named)).items()],
            right=across.stop,
            points=len(self.points),
            logarithmic=up.logarithmic,
        )


def _given(fields: Mapping[str, Any], name: str) -> bool:
    return fields.get(name) is not None


def _point(point: Any, path: object) -> tuple[int, float]:
    size, error = (point.get("bytes"), point.get("error")) if isinstance(point, dict) else (None, None)
    if type(size) is int and 0 <= size < 2**63 and isinstance(error, (int, float)) and -_MOST < error < _MOST:
        return size, float(error)
    raise FormatError(f"{path}: a point has bytes, a whole number, and error, a number below 1e100; not {point!r}")


def _index(index: object, name: str, points: list[tuple[int, float]], path: object) -> int:
    if type(index) is not int or not 0 <= index < len(points):
        raise FormatError(f"{path}: {name} is the index of one of {len(points)} points, or null; not {index!r}")
    return index
