"""Bars with their spreads, one panel for every case. matplotlib is imported here only, and only when asked for."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import attrs

from benchmarks.report import Cell

Kind = Literal["ours", "plain", "other"]
COLOURS: Mapping[Kind, str] = {"ours": "tab:green", "plain": "tab:gray", "other": "tab:blue"}
#: The first words of contenders' names; all others are other libraries.
KINDS: Mapping[str, Kind] = {"fewbits": "ours", "dense": "plain", "copy_": "plain"}


@attrs.frozen
class Bar:
    """One number.

    Attributes:
        name: at its left.
        value: its length.
        spread: from where to where it was measured.
        kind: whose it is.
    """

    name: str
    value: float
    spread: tuple[float, float]
    kind: Kind = "other"


@attrs.frozen
class Panel:
    """Bars to be compared; shorter is better.

    Attributes:
        title: above.
        unit: below.
        bars: from the top.
        mark: a dashed line, for what all are compared with.
        log: whether the axis is logarithmic.
    """

    title: str
    unit: str
    bars: Sequence[Bar]
    mark: float | None = None
    log: bool = True


def timings(cells: Sequence[Cell]) -> list[Panel]:
    """A panel for every case, in milliseconds."""
    grouped = groupby(cells, key=lambda cell: dict(cell.case))
    return [_timings_of(case, list(group)) for case, group in grouped]


def _timings_of(case: dict[str, Any], cells: Sequence[Cell]) -> Panel:
    bars = [_timing(cell) for cell in cells]
    mark = statistics.median(cells[0].baseline) * 1e3 if cells[0].baseline else None
    return Panel(", ".join(f"{key} {value}" for key, value in case.items()), "ms", bars, mark)


def _timing(cell: Cell) -> Bar:
    spread = min(cell.seconds) * 1e3, max(cell.seconds) * 1e3
    return Bar(cell.contender, cell.median * 1e3, spread, KINDS.get(cell.contender.split()[0], "other"))


def draw(panels: Sequence[Panel], title: str, path: Path) -> None:
    """Draw them side by side; the format is told by the file's name.

    Raises:
        SystemExit: if matplotlib is not installed, or there is nothing to draw.
    """
    if not panels:
        raise SystemExit("there is nothing to plot: no contender was measured")
    pyplot = _pyplot()
    longest = max(len(panel.bars) for panel in panels)
    size = 2 + 4.2 * len(panels), 1.5 + 0.3 * longest
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for axis, panel in zip(axes[0], panels, strict=True):
        _draw_panel(axis, panel)
    figure.suptitle(title)
    figure.savefig(path)
    pyplot.close(figure)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("--plot needs matplotlib, which is not installed: pip install matplotlib") from None
    matplotlib.use("Agg")  # no display is needed
    from matplotlib import pyplot

    return pyplot


def _draw_panel(axis: Any, panel: Panel) -> None:
    names, values = [bar.name for bar in panel.bars], [bar.value for bar in panel.bars]
    around = [[b.value - b.spread[0] for b in panel.bars], [b.spread[1] - b.value for b in panel.bars]]
    colours = [COLOURS[bar.kind] for bar in panel.bars]
    axis.barh(names, values, xerr=around, color=colours, error_kw={"linewidth": 0.8})
    if panel.mark is not None:
        axis.axvline(panel.mark, color="black", linewidth=0.8, linestyle="--")
    if panel.log:
        axis.set_xscale("log")
        axis.set_xlim(10 ** math.floor(math.log10(min(values))), 10 ** math.ceil(math.log10(max(values))))
    axis.invert_yaxis()
    axis.set_xlabel(panel.unit)
    axis.set_title(panel.title, fontsize="small")
    axis.tick_params(axis="y", labelsize="small")
