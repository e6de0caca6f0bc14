"""Time a quantization from disk to disk against a copy of the same files.

The copy runs ``cp`` and ``sync``, so its bytes are on the disk when the clock stops. fewbits runs `fewbits.quantize`
from path to path with ``validate=False``: it reads, quantizes, hashes each tensor, writes, calls fsync on files and
directories, reads the result back, compares the SHA-256 of every tensor, and renames the directory. Imports and the
comparison with the source are not timed. Contenders take turns in rotating order; every result is removed before the
next turn. Ratios are taken within a round.

A first pass reads the source, so that it is cached. The disk of ``--out`` needs room for one result, and memory needs
room for the cached source. Threads are compared only where ``--out`` lies in memory (/dev/shm): on a disk both would
wait for the disk.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import fewbits
from benchmarks import cli, disk
from benchmarks.report import Cell, Report, aligned, said
from benchmarks.timing import rotated, timed
from fewbits.quantizers.schemes import SCHEMES

COPY = "cp and sync"
#: Scheme -> (promised, desired) time of fewbits, as a multiple of a copy.
PROMISED = {"int8": (4.0, 2.0), "int4": (6.0, 3.0)}
#: With this scheme, two threads are so many times faster than one.
TWICE, FASTER = "int4", 1.5


def copy(source: Path, output: Path) -> None:
    output.mkdir()
    made = [output / path.name for path in disk.files(source)]
    subprocess.run(["cp", *map(str, disk.files(source)), str(output)], check=True)
    subprocess.run(["sync", *map(str, made), str(output)], check=True)


def quantize(source: Path, output: Path, scheme: str, threads: int) -> None:
    torch.set_num_threads(threads)
    fewbits.quantize(source, scheme, output=fewbits.Output(output, threads=threads), validate=False)


def contenders(
    source: Path, output: Path, schemes: Sequence[str], threads: Sequence[int]
) -> dict[str, Callable[..., None]]:
    made: dict[str, Callable[..., None]] = {COPY: functools.partial(copy, source, output)}
    for scheme in schemes:
        for count in threads:
            made[label(scheme, count)] = functools.partial(quantize, source, output, scheme, count)
    return made


def label(scheme: str, threads: int) -> str:
    return f"{scheme}, {threads} thread{'s' if threads > 1 else ''}"


def measure(report: Report, calls: dict[str, Callable[..., None]], output: Path, rounds: int) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for r in range(rounds):
        for name in rotated(list(calls), r):
            seconds[name].append(timed(calls[name]))
            shutil.rmtree(output)
    report.cells = [Cell({}, name, each, seconds[COPY]) for name, each in seconds.items()]


def ratios(own: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Compute the least, median and largest ratio within a round."""
    found = [mine / theirs for mine, theirs in zip(own, other, strict=True)]
    return min(found), statistics.median(found), max(found)


def checks(report: Report, threads: Sequence[int], *, twice: bool) -> list[str]:
    seconds = {cell.contender: cell.seconds for cell in report.cells}
    lines = []
    for scheme, (most, aim) in PROMISED.items():
        own = seconds.get(label(scheme, max(threads)))
        if own is not None:
            _, found, _ = ratios(own, seconds[COPY])
            aimed = "reached" if found <= aim else "not reached"
            lines.append(
                said(f"{scheme}: at most {most:g} copies, found {found:.2f}; aim {aim:g}, {aimed}", found <= most)
            )
    pair = [seconds.get(label(TWICE, count)) for count in (1, 2)]
    if twice and pair[0] and pair[1]:
        _, found, _ = ratios(pair[0], pair[1])
        lines.append(said(f"{TWICE}: 2 threads {FASTER:g} times faster than 1, found {found:.2f}", found >= FASTER))
    return lines


def table(report: Report) -> str:
    lines = [("", "seconds, least", "median", "most", "copies, least", "median", "most")]
    for cell in report.cells:
        own = min(cell.seconds), cell.median, max(cell.seconds)
        found = (*own, *ratios(cell.seconds, cell.baseline))
        lines.append((cell.contender, *(f"{value:.2f}" for value in found)))
    return aligned(lines)


def need_room(made: argparse.ArgumentParser, source: Path, out: Path) -> None:
    size = disk.folder_size(source)
    disk.need_room(made, out, size)
    cached = 0 if disk.in_memory(source) else size
    needed = cached + (size if disk.in_memory(out) else 0) + disk.SPARE
    if disk.available() < needed:
        made.error(f"{needed / disk.MB:,.0f} MB of memory are needed, {disk.available() / disk.MB:,.0f} are available")


def main(argv: Sequence[str] | None = None) -> int:
    made = cli.parser(__doc__, rounds=3)
    made.add_argument("source", type=Path, metavar="DIR", help="a checkpoint, such as tests/stress/synthetic.py writes")
    made.add_argument("--out", type=Path, default=Path("/tmp"), metavar="DIR", help="directory for temporary results")
    made.add_argument(
        "--scheme", type=cli.listed(str), default=[*PROMISED], metavar="NAME,...", help=", ".join(SCHEMES)
    )
    made.add_argument("--compare", type=cli.listed(cli.positive), default=[1, 2], metavar="N,...", help="threads; 1,2")
    arguments = made.parse_args(argv)
    if not set(arguments.scheme) <= {*SCHEMES}:
        made.error(f"--scheme {','.join(arguments.scheme)}: the schemes are {', '.join(SCHEMES)}")
    need_room(made, arguments.source, arguments.out)
    report = cli.begin("copying", arguments)
    disk.digests(arguments.source)  # now its pages are cached
    with tempfile.TemporaryDirectory(dir=arguments.out) as work:
        output = Path(work) / "out"
        calls = contenders(arguments.source, output, arguments.scheme, arguments.compare)
        measure(report, calls, output, arguments.rounds)
    lines = checks(report, arguments.compare, twice=disk.in_memory(arguments.out))
    return cli.finish(report, table(report), arguments, lines)


if __name__ == "__main__":
    sys.exit(main())
