"""Time the quantization of one float32 layer, by fewbits and by other libraries, against a copy of its weight.

fewbits runs `Quantizer.convert`, which does not validate; `prepare`, which does not read the weight, runs before.
Every contender gets a fresh layer, made before the clock starts. Ratios are to ``dst.copy_(src)`` of the weight into
touched memory, in the same round.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks import cli, ours, peers
from benchmarks.contender import COPY, Contender, copy_contender, linear
from benchmarks.presets import scheme, shape
from benchmarks.report import Cell, Failure, Report, aligned, milliseconds, said
from benchmarks.timing import PAUSE, reason, rotated, timed

#: The longest promised time, in copies of the weight.
PROMISED = {"fewbits int8": 4.0, "fewbits int4": 8.0}
#: The least ratio to the time of the Python peers.
FASTER = 4.0
PYTHON_PEERS = ("torchao", "optimum-quanto", "bitsandbytes", "hqq")
#: A contender that takes more seconds than this is timed in the first round only.
PATIENCE = 5.0


def measure(report: Report, contenders: Sequence[Contender], weight: Tensor, rounds: int) -> None:
    where = {"shape": "x".join(map(str, weight.shape))}
    alive = {contender.name: contender for contender in contenders if contender.start is not None}
    seconds: dict[str, list[float]] = {name: [] for name in alive}
    for r in range(-1, rounds):  # the first round warms up, and does not count
        for name in rotated(list(alive), r):
            try:
                _turn(alive[name], weight, seconds[name], warming=r < 0)
            except Exception as error:  # one failure must not stop the others
                report.failures.append(Failure(where, name, reason(error)))
                del alive[name]
    copying = seconds[COPY]
    for name, contender in alive.items():
        report.cells.append(Cell(where, name, seconds[name], copying, {"package": contender.package}))


def _turn(contender: Contender, weight: Tensor, seconds: list[float], *, warming: bool) -> None:
    if warming:
        time_once(contender, weight[:64, :256])
    elif not seconds or seconds[0] <= PATIENCE:
        seconds.append(time_once(contender, weight))


def time_once(contender: Contender, weight: Tensor) -> float:
    if contender.start is None:
        raise ValueError(f"{contender.name} does not quantize")
    call = contender.start(linear(weight, contender.dtype))
    gc.collect()
    time.sleep(PAUSE)
    return timed(call)


def table(report: Report) -> str:
    lines = [(cell.contender, milliseconds(cell), f"{1 / cell.speed:.2f}x") for cell in report.cells]
    return aligned([("", "one layer", "in copies"), *lines])


def checks(report: Report) -> list[str]:
    at = {cell.contender: cell for cell in report.cells}
    lines = []
    for name, most in PROMISED.items():
        if name in at:
            found = 1 / at[name].speed
            lines.append(said(f"{name}: at most {most:g} copies, found {found:.2f}", found <= most))
    slowest = max((at[name].median for name in PROMISED if name in at), default=None)
    others = [cell for cell in report.cells if cell.facts["package"] in PYTHON_PEERS]
    if slowest is not None:
        for cell in others:
            found = cell.median / slowest
            lines.append(said(f"{FASTER:g} times faster than {cell.contender}, found {found:.1f}", found >= FASTER))
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    made = cli.parser(__doc__, peers=True)
    made.add_argument(
        "--shape", type=shape, default=(4096, 4096), metavar="OUTxIN", help="shape of the weight; 4096x4096"
    )
    made.add_argument("--group-size", type=cli.positive, default=128, metavar="N", help="group size; 128")
    made.add_argument("--scheme", type=cli.listed(scheme), default=["int8", "int4"], metavar="NAME,...")
    arguments = made.parse_args(argv)
    report = cli.begin("quantize", arguments, ["numpy"] if arguments.peers else [])
    own = ours.contenders(arguments.scheme, [torch.float32], arguments.group_size)
    others = peers.contenders([torch.float32], arguments.group_size) if arguments.peers else []
    measure(report, [copy_contender(), *own, *others], torch.randn(arguments.shape), arguments.rounds)
    return cli.finish(report, table(report), arguments, checks(report))


if __name__ == "__main__":
    sys.exit(main())
