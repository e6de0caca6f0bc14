"""Time one linear layer: dense, by fewbits, and by other libraries, in one run.

Contenders take turns in every round. Each has so many layers that their weights overflow the last cache. Ratios are
to dense float32, within a round; ± is half the distance from the fastest to the slowest round.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from benchmarks import cli, ours, peers, promises
from benchmarks.contender import BASELINE, Contender, Layer, copies, dense
from benchmarks.presets import PRESETS, Case, Preset, listing, resolved, scheme, shape
from benchmarks.report import Cell, Failure, Report, aligned, milliseconds, pivot
from benchmarks.timing import Cycle, interleave, reason


def entrants(preset: Preset, case: Case) -> list[Contender]:
    own = ours.contenders(preset.schemes, preset.dtypes, case.group_size)
    others = peers.contenders(preset.dtypes, case.group_size) if preset.peers else []
    return [*map(dense, preset.floats()), *own, *(other for other in others if other.build is not None)]


def measure(report: Report, preset: Preset, *, rounds: int, multiple: float, turn: float) -> None:
    for case in preset.cases:
        _measure_case(report, preset, case, rounds, multiple, turn)


Built = dict[str, tuple[Contender, list[Layer]]]


def _measure_case(report: Report, preset: Preset, case: Case, rounds: int, multiple: float, turn: float) -> None:
    weight = torch.randn(case.outputs, case.inputs) / case.inputs**0.5
    built = _build(report, case, entrants(preset, case), weight, multiple)
    for rows in preset.rows:
        _measure_rows(report, case, built, weight, rows, rounds, turn)


def _build(report: Report, case: Case, contenders: Sequence[Contender], weight: Tensor, multiple: float) -> Built:
    built: Built = {}
    for contender in contenders:
        count = copies(weight.numel(), contender.bits, multiple)
        try:
            built[contender.name] = contender, contender.layers(weight, count)
        except Exception as error:  # one failure must not stop the others
            report.failures.append(Failure({"case": str(case)}, contender.name, reason(error)))
    return built


def _measure_rows(
    report: Report, case: Case, built: Built, weight: Tensor, rows: int, rounds: int, turn: float
) -> None:
    x = torch.randn(rows, case.inputs)
    where = {"case": str(case), "M": rows}
    with torch.no_grad():  # some peers fail in inference_mode
        inputs = {name: x.to(contender.dtype) for name, (contender, _) in built.items()}
        calls = {name: Cycle(layers, inputs[name]) for name, (_, layers) in built.items()}
        timed = interleave(calls, rounds, turn=turn)
        reference = x @ weight.t()
        for name, seconds in timed.seconds.items():
            contender, layers = built[name]
            facts = _facts(contender, layers, inputs[name], reference)
            report.cells.append(Cell(where, name, seconds, timed.seconds.get(BASELINE, ()), facts))
    report.failures += [Failure(where, name, why) for name, why in timed.failures.items()]


def _facts(contender: Contender, layers: list[Layer], x: Tensor, reference: Tensor) -> dict[str, object]:
    known = ours.explained(layers[0], x) if contender.package == "fewbits" else {}
    about = {"package": contender.package, "dtype": str(x.dtype).removeprefix("torch."), "layers": len(layers)}
    return {**about, "sqnr_db": sqnr_db(layers[0](x), reference), **known}


def sqnr_db(output: Tensor, reference: Tensor) -> float | None:
    noise = (output.double() - reference.double()).square().sum()
    return float(10 * torch.log10(reference.double().square().sum() / noise)) if noise else None


def table(report: Report) -> str:
    parts = []
    for case, group in groupby(report.cells, key=lambda cell: cell.case["case"]):
        cells = list(group)
        parts.append(
            f"{case}: times faster than dense fp32\n{aligned(pivot(cells, 'M', lambda cell: f'{cell.speed:.2f}x'))}"
        )
        parts.append(f"{case}: one call\n{aligned(pivot(cells, 'M', milliseconds))}")
        parts.append(f"{case}: dB of the output\n{aligned(pivot(cells, 'M', _decibels))}")
        if named := [cell for cell in cells if "kernel" in cell.facts]:
            parts.append(f"{case}: kernel\n{aligned(pivot(named, 'M', lambda cell: cell.facts['kernel']))}")
    return "\n\n".join(parts)


def _decibels(cell: Cell) -> str:
    return "equal" if cell.facts["sqnr_db"] is None else f"{cell.facts['sqnr_db']:.1f}"


def main(argv: Sequence[str] | None = None) -> int:
    made = cli.parser(f"{__doc__}\n{listing()}", peers=True)
    made.set_defaults(peers=None)
    made.add_argument("--preset", choices=[*PRESETS], default="table", help="defaults for the other options; table")
    made.add_argument("--shape", type=cli.listed(shape), metavar="OUTxIN,...", help="shapes of the weights")
    made.add_argument("--rows", type=cli.listed(cli.positive), metavar="M,...", help="rows or dtypes of the inputs")
    made.add_argument("--dtype", type=cli.listed(cli.dtype), metavar="DTYPE,...", help="rows or dtypes of the inputs")
    made.add_argument("--group-size", type=cli.listed(cli.positive), metavar="N,...", help="group sizes")
    made.add_argument("--scheme", type=cli.listed(scheme), metavar="NAME,...", help=", ".join(ours.SCHEMES))
    made.add_argument("--cache-multiple", type=float, default=4, help="bytes of all layers, in last caches; 4")
    made.add_argument("--turn", type=float, default=0.1, help="least seconds of one turn; 0.1")
    arguments = made.parse_args(argv)
    preset = resolved(arguments)
    arguments.peers = preset.peers
    report = cli.begin("linear", arguments)
    measure(report, preset, rounds=arguments.rounds, multiple=arguments.cache_multiple, turn=arguments.turn)
    return cli.finish(report, table(report), arguments, promises.checked(report.cells))


if __name__ == "__main__":
    sys.exit(main())
