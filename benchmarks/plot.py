"""Draw the results of `benchmarks.quality`: bits per weight against what a model loses.

    python -m benchmarks.quality --json quality.json
    python -m benchmarks.plot quality.json language "topics KL" docs/quality.svg

Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

#: Points of one family have one colour and marker.
_FAMILIES = {"fewbits": ("#0b6e99", "o"), "": ("#b5651d", "s")}


def draw(rows: Sequence[Mapping[str, Any]], figure: str, task: str, target: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "fewbits"  # the same file for the same results
    drawing, axes = pyplot.subplots(figsize=(8, 5))
    for row in rows:
        if row["name"] == "float":
            continue
        colour, marker = _FAMILIES["fewbits" if row["name"].startswith("fewbits") else ""]
        axes.plot(row["bits"], row[figure], marker, color=colour, markersize=5)
        label = row["name"].removeprefix("fewbits ")
        axes.annotate(label, (row["bits"], row[figure]), xytext=(5, 3), textcoords="offset points", fontsize=7)
    if "KL" in figure:
        axes.set_yscale("log")
    axes.set(xlabel="bits per weight", ylabel=figure, title=f"{task}: fewbits (circles) and others (squares)")
    axes.grid(alpha=0.3, which="both")
    drawing.tight_layout()
    drawing.savefig(target, metadata={"Date": None})


def main(argv: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("results", "task", "figure", "target"):
        made.add_argument(name)
    arguments = made.parse_args(argv)
    found = json.loads(Path(arguments.results).read_text(encoding="utf-8"))
    draw(found[arguments.task], arguments.figure, arguments.task, Path(arguments.target))
    return 0


if __name__ == "__main__":
    sys.exit(main())
