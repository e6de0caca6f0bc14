"""Measure the cost of one small tensor: quantize, resume, verify and load thousands of them.

    python -m benchmarks.many_tensors --tensors 20000 --rounds 3

Times are CPU seconds of this process, which other programs disturb less than the clock. The table shows the median of
the rounds, milliseconds per tensor, and the ratio to quantizing in the same round.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

import fewbits
from benchmarks import cli
from benchmarks.report import Cell, Report, aligned

#: Shape of each tensor: 12 kB in float32.
SHAPE = (48, 64)
MADE = "made"


def write(path: Path, tensors: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    names = (f"layers.{index // 10}.experts.{index % 10}.weight" for index in range(tensors))
    save_file({name: torch.randn(SHAPE, generator=generator) for name in names}, path)


def steps(source: Path, output: Path, threads: int) -> dict[str, Callable[[], object]]:
    def quantize(resume: bool) -> object:
        return fewbits.quantize(source, "int8", output=fewbits.Output(output, resume=resume, threads=threads))

    return {
        MADE: lambda: quantize(resume=False),
        "resumed": lambda: quantize(resume=True),
        "verified": lambda: fewbits.verify(output, source),
        "loaded": lambda: fewbits.load(output),
    }


def measure(report: Report, source: Path, folder: Path, rounds: int, threads: int) -> None:
    seconds: dict[str, list[float]] = {}
    for index in range(rounds):
        output = folder / f"{index}.safetensors"
        for name, act in steps(source, output, threads).items():
            start = time.process_time()
            act()
            seconds.setdefault(name, []).append(time.process_time() - start)
        output.unlink()
    report.cells = [Cell({}, name, each, seconds[MADE]) for name, each in seconds.items()]


def table(report: Report, tensors: int) -> str:
    lines = [("", "seconds of the CPU", "ms a tensor", "of making it")]
    for cell in report.cells:
        figures = f"{cell.median:.2f}", f"{cell.median / tensors * 1000:.3f}", f"{1 / cell.speed:.2f}"
        lines.append((cell.contender, *figures))
    return aligned(lines)


def main(argv: Sequence[str] | None = None) -> int:
    made = cli.parser(__doc__, rounds=3, check=False)
    made.add_argument("--tensors", type=cli.positive, default=20_000, metavar="N", help="how many; 20000")
    arguments = made.parse_args(argv)
    report = cli.begin("many_tensors", arguments)
    with tempfile.TemporaryDirectory() as work:
        source = Path(work) / "source.safetensors"
        write(source, arguments.tensors, arguments.seed)
        measure(report, source, Path(work), arguments.rounds, arguments.threads)
    cli.finish(report, table(report, arguments.tensors), arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
