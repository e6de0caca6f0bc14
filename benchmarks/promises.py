"""The speed ratios that fewbits promises, and a check of one run against them.

A promise names two contenders and the least ratio of their speeds in the same run. Most promises are about a 4096x4096
layer. Processors with and without VNNI have different promises.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Sequence

from benchmarks.contender import BASELINE
from benchmarks.machine import has_vnni
from benchmarks.presets import ODD_SHAPES
from benchmarks.report import Cell, said

USUAL = "4096x4096 g128"
ODD = {str(case) for case in ODD_SHAPES}
ROWS = (1, 4, 32, 256)

#: Contender -> times faster than dense at each of `ROWS`; None where nothing is promised.
WITH_VNNI = {
    "fewbits int8": (2.7, 2.5, 0.75, 0.85),
    "fewbits int4": (4.3, 3.0, 0.60, 0.75),
    "fewbits int8-dynamic": (3.0, 2.5, 2.5, 2.5),
    "fewbits int4-compute-int8": (None, None, None, 1.2),
}
WITHOUT_VNNI = {
    "fewbits int8": (2.0, 2.5, 0.70, 0.75),
    "fewbits int4": (2.2, 2.5, 0.60, 0.70),
    "fewbits int8-dynamic": (None, None, 1.6, 1.6),
}
#: Least ratio to dense at any other number of rows.
NO_CLIFF = {"fewbits int8": 0.6, "fewbits int4": 0.5}

#: Schemes that have at least half the speed of int4 or int8, at any number of rows.
HALF = {
    **dict.fromkeys(("fewbits int2", "fewbits int3", "fewbits nf4", "fewbits mxfp4"), "fewbits int4"),
    **dict.fromkeys(("fewbits int5", "fewbits int6", "fewbits int7", "fewbits fp8"), "fewbits int8"),
}

#: One row: fewbits against peers with as many bits. A peer matches if its name starts with one of these.
PYTHON_PEERS = {
    "fewbits int8": ("torchao int8, fp32", "quanto qint8, fp32", "bitsandbytes int8, fp32"),
    "fewbits int4": ("torchao intx int4", "quanto qint4, fp32", "bitsandbytes nf4, fp32", "hqq 4 bit g64, fp32"),
    "fewbits int8-dynamic": ("torchao int8 dynamic, fp32",),
}
FAST_PEERS = {
    "fewbits int8": ("onnxruntime 8 bit",),
    "fewbits int4": ("onnxruntime 4 bit",),
    "fewbits int8, bf16": ("quanto qint8, bf16",),
    "fewbits int4, bf16": ("quanto qint4, bf16",),
}


def checked(cells: Sequence[Cell]) -> list[str]:
    """Check all promises that these cells can show: one line each."""
    at = {(cell.case["case"], cell.case["M"], cell.contender): cell for cell in cells}
    lines = []
    for (case, rows, own), cell in at.items():
        for others in _promised(case, rows, own, [name for c, r, name in at if (c, r) == (case, rows)]):
            found = [(other, least, at[case, rows, other]) for other, least in others if (case, rows, other) in at]
            times = [(name, least, _times(cell, other)) for name, least, other in found]
            if times:
                compared = " or ".join(f"{got:.2f} times {name} (at least {least:.2f})" for name, least, got in times)
                held = any(got >= least for _, least, got in times)
                lines.append(said(f"{own}, {case}, M {rows}: {compared}", held))
    return lines


def _times(own: Cell, other: Cell) -> float:
    return statistics.median([theirs / mine for mine, theirs in zip(own.seconds, other.seconds, strict=True)])


Others = list[tuple[str, float]]


def _promised(case: str, rows: int, own: str, present: Sequence[str]) -> Iterator[Others]:
    if case == USUAL:
        if (least := _least(own, rows)) is not None:
            yield [(BASELINE, least)]
        if rows == 1:
            yield from _against_peers(own, present)
        if own in HALF:
            yield [(HALF[own], 0.5)]
    elif case in ODD and (least := _odd(own, rows)) is not None:
        yield [(BASELINE, least)]
    if narrow := re.fullmatch(r"(fewbits int[48]), (bf16|fp16)", own):
        yield [(narrow[1], 1 / 1.1), (f"dense {narrow[2]}", 1.0)]


def _least(own: str, rows: int) -> float | None:
    if rows not in ROWS:
        return NO_CLIFF.get(own)
    table = WITH_VNNI if has_vnni() else WITHOUT_VNNI
    return table.get(own, (None,) * len(ROWS))[ROWS.index(rows)]


def _odd(own: str, rows: int) -> float | None:
    if own == "fewbits int8" and rows >= 32:
        return 1 / 1.5
    if own == "fewbits int4" and rows >= 32:
        return 1 / (1.5 if rows >= 256 else 2.2)
    return None


def _against_peers(own: str, present: Sequence[str]) -> Iterator[Others]:
    least = 10.0 if has_vnni() else 5.0
    for table, times in ((PYTHON_PEERS, least), (FAST_PEERS, 1 / 1.1)):
        for start in table.get(own, ()):
            yield from ([(name, times)] for name in present if name.startswith(start))
