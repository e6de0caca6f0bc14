"""Draw the results of `benchmarks.quality`: bits per weight against what a model loses, one drawing for each figure.

    python -m benchmarks.quality --json quality.json
    python -m benchmarks.plot quality.json docs/results

Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

#: Colour, marker and side of the labels, of fewbits' own schemes, and of other libraries.
_OWN, _OTHERS = ("#0b6e99", "o", "right"), ("#b5651d", "s", "left")

_NO_FIGURES = ("name", "bits", "seconds")


def draw(rows: Sequence[Mapping[str, Any]], figure: str, title: str, target: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "fewbits"  # the same file for the same results
    drawing, axes = pyplot.subplots(figsize=(9, 5.5))
    for number, row in enumerate(sorted(rows, key=lambda row: row[figure])):
        if row["name"] == "float":
            if "KL" not in figure:
                axes.axhline(row[figure], color="#888888", linewidth=0.8, label="float")
            continue
        colour, marker, side = _OWN if row["name"].startswith("fewbits") else _OTHERS
        axes.plot(row["bits"], row[figure], marker, color=colour, markersize=5)
        label = row["name"].removeprefix("fewbits ")
        # Neighbours have their labels above and below.
        offset = (5 if side == "left" else -5, 3 if number % 2 else -7)
        point = (row["bits"], row[figure])
        axes.annotate(label, point, xytext=offset, textcoords="offset points", fontsize=7, horizontalalignment=side)
    if "KL" in figure:
        axes.set_yscale("log")
    axes.set(xlabel="stored bits per weight", ylabel=figure, title=f"{title}: fewbits (circles), others (squares)")
    axes.margins(x=0.2)
    axes.grid(alpha=0.3, which="both")
    drawing.tight_layout()
    drawing.savefig(target, metadata={"Date": None})
    pyplot.close(drawing)


def drawings(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw each figure of each task whose rows are among the results."""
    made = []
    for task, rows in results.items():
        if not isinstance(rows, list) or not rows or not isinstance(rows[0], dict) or "bits" not in rows[0]:
            continue
        for figure in (key for key in rows[0] if key not in _NO_FIGURES):
            made.append(folder / f"{task}-{figure.replace(' ', '-').lower()}.svg")
            draw(rows, figure, task, made[-1])
    return made


def main(argv: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("results", type=Path, help="what --json of benchmarks.quality wrote")
    made.add_argument("folder", type=Path, help="an existing directory for the drawings")
    arguments = made.parse_args(argv)
    for path in drawings(json.loads(arguments.results.read_text(encoding="utf-8")), arguments.folder):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
