"""What one of our modules costs beside the same ATen calls written inline: one row, 64x64, eager.

Both are called in turns, a thousand times each, until each was called ten thousand times. What is inline makes the
calls that the module's kernel makes, with tensors at hand; the ATen operations of both are recorded and compared, views
aside, so that the comparison says so if it is none.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import cli, ours
from benchmarks.contender import Layer, linear
from benchmarks.report import Cell, Failure, Report, aligned
from benchmarks.timing import reason, timed

SIDE = 64
CALLS = 10_000
#: What one of our modules may cost beside its calls, in seconds.
PROMISED = 8e-6

PACK_INT4 = torch.ops.aten._convert_weight_to_int4pack_for_cpu
INT4 = torch.ops.aten._weight_int4pack_mm_for_cpu


@attrs.frozen
class Pair:
    """A module, and what it is compared with."""

    module: Layer
    inline: Layer


def _dense(weight: Tensor) -> Pair:
    layer = linear(weight, torch.float32)
    held = layer.weight
    return Pair(layer, lambda x: F.linear(x, held))


def _int8(weight: Tensor) -> Pair:
    codes = torch.randint(-127, 128, weight.shape, dtype=torch.int8)
    scale = torch.rand(weight.shape[0])
    return Pair(_ours("int8", weight), lambda x: torch.mm(x, codes.to(x.dtype).t()) * scale)


def _int4(weight: Tensor) -> Pair:
    packed = PACK_INT4(torch.randint(0, 16, weight.shape, dtype=torch.int32), 1)
    table = torch.rand(1, weight.shape[0], 2).to(torch.bfloat16)
    bf16 = torch.bfloat16
    return Pair(_ours("int4", weight), lambda x: INT4(x.to(bf16), packed, SIDE, table).to(x.dtype))


def _ours(scheme: str, weight: Tensor) -> Layer:
    contender = ours.contenders([scheme], [torch.float32], SIDE)[0]
    return contender.layers(weight, 1)[0]


PAIRS: dict[str, Callable[[Tensor], Pair]] = {"dense fp32": _dense, "fewbits int8": _int8, "fewbits int4": _int4}


def run(arguments: argparse.Namespace, calls: int = CALLS) -> int:
    """Measure, print and write; 1 if ``--check`` finds that a module costs more than promised."""
    arguments.peers = False
    report = cli.begin("overhead", arguments)
    weight, x = torch.randn(SIDE, SIDE) / SIDE**0.5, torch.randn(1, SIDE)
    for name, make in PAIRS.items():
        try:
            with torch.inference_mode():
                report.cells += _measured(name, make(weight), x, calls)
        except Exception as error:  # the others go on
            report.failures.append(Failure({}, name, reason(error)))
    cli.finish(report, _table(report), arguments)
    costs = [_cost(*pair) for pair in _pairs(report) if pair[0].contender.startswith("fewbits")]
    return int(arguments.check and any(cost > PROMISED for cost in costs))


def _measured(name: str, pair: Pair, x: Tensor, calls: int) -> list[Cell]:
    """Two cells: the module and the inline calls. Their numbers are medians of a turn of at most a thousand calls."""
    in_turn = min(calls, 1000)
    both = {name: pair.module, f"{name} inline": pair.inline}
    seconds: dict[str, list[float]] = {who: [] for who in both}
    for _ in range(max(1, calls // in_turn)):
        for who, layer in both.items():
            layer(x)
            seconds[who].append(statistics.median(timed(partial(layer, x)) for _ in range(in_turn)))
    where, base = {"M": 1, "shape": f"{SIDE}x{SIDE}"}, seconds[f"{name} inline"]
    return [Cell(where, who, times, base, {"aten": aten_calls(both[who], x)}) for who, times in seconds.items()]


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func.overloadpacket.__name__)
        if name.endswith("_") or not _is_view(result, args):
            self.names.append(name)
        return result


def _is_view(result: object, args: Sequence[object]) -> bool:
    """Whether an operation moved no data: a view, or a cast to the dtype that is there."""
    tensors = isinstance(result, Tensor) and args and isinstance(args[0], Tensor)
    return bool(tensors and result.data_ptr() == args[0].data_ptr())  # type: ignore[attr-defined]


def aten_calls(layer: Layer | nn.Module, x: Tensor) -> list[str]:
    """The ATen operations of a call that move data, in order."""
    recorder = _Recorder()
    with recorder:
        layer(x)
    return recorder.names


def _pairs(report: Report) -> list[tuple[Cell, Cell]]:
    return list(zip(report.cells[::2], report.cells[1::2], strict=True))


def _cost(module: Cell, inline: Cell) -> float:
    return module.median - inline.median


def _table(report: Report) -> str:
    lines = [("", "module us", "inline us", "cost us", "ATen calls")]
    for module, inline in _pairs(report):
        times = [f"{seconds * 1e6:.1f}" for seconds in (module.median, inline.median, _cost(module, inline))]
        ours, theirs = module.facts["aten"], inline.facts["aten"]
        same = "the same" if ours == theirs else f"differ: {' '.join(ours)} | {' '.join(theirs)}"
        lines.append((module.contender, *times, same))
    return f"one row, {SIDE}x{SIDE}, inference_mode, eager\n{aligned(lines)}"
