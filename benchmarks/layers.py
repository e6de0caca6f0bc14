"""Time layers of every class against the float layers that they replace, in one run.

The rule: no quantized layer is slower than its float layer by more than 10 % plus 20 microseconds. ``--check`` tells
which layers break it, apart from the listed exceptions.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor, nn

import fewbits
from benchmarks import cli
from benchmarks.report import Cell, Failure, Report, aligned, said
from benchmarks.timing import Call, interleave, reason

BASELINE = "float"

#: Contender -> the settings of `fewbits.quantize`.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "int8": {"scheme": "int8"},
    "int4": {"scheme": "int4"},
    "int8, dynamic inputs": {"scheme": "int8", "activations": "dynamic"},
}

#: Inputs of a layer.
INPUTS = 5

#: What a layer may take longer: a share, and seconds.
SHARE, SECONDS = 0.10, 20e-6

#: Layers that may break the rule, by the beginnings of their names, with the contenders; the comments say why.
EXCEPTIONS: Mapping[str, Sequence[str]] = {
    "Conv": ("int4",),  # small ones decode the weight at every forward, which takes as long as the convolution
    "Conv2d depthwise": ("int8, dynamic inputs",),  # rounding the inputs takes longer than so small a convolution
    "LSTM 512 x 2, sequence of 100": tuple(VARIANTS),  # the weights are decoded once for a sequence
    "Embedding": ("int4",),  # rows are unpacked and scaled; the float layer copies them
    "Linear 64": tuple(VARIANTS),  # the call of a kernel takes longer than so small a product
}


@attrs.frozen
class Layer:
    """A float layer and its arguments."""

    name: str
    make: Callable[[], nn.Module]
    arguments: Callable[[], tuple[Tensor, ...]]


class SwiGLUExperts(nn.Module):
    """Fused experts, each token routed to four of them, as in models of transformers."""

    def __init__(self, experts: int, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(experts, 2 * inner, hidden) / hidden**0.5)
        self.down = nn.Parameter(torch.randn(experts, hidden, inner) / inner**0.5)

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        output = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            token = (chosen == expert).any(1).nonzero().squeeze(1)
            gate, up = nn.functional.linear(x[token], self.gate_up[expert]).chunk(2, 1)
            part = nn.functional.linear(nn.functional.silu(gate) * up, self.down[expert])
            output.index_add_(0, token, part)
        return output


def _input(*shape: int) -> tuple[Tensor, ...]:
    return (torch.randn(*shape),)


def _same_three_times(*shape: int) -> tuple[Tensor, ...]:
    return (torch.randn(*shape),) * 3


def _routed(tokens: int) -> tuple[Tensor, ...]:
    return torch.randn(tokens, 1024), torch.rand(tokens, 32).topk(4, 1).indices


def _indices(count: int) -> tuple[Tensor, ...]:
    return (torch.randint(0, 50_000, (count,)),)


def layers() -> Iterator[Layer]:
    for rows in (1, 16, 128, 1024):
        yield Layer(f"Linear 1024, {rows} rows", partial(nn.Linear, 1024, 1024), partial(_input, rows, 1024))
    yield Layer("Linear 64, 1 row", partial(nn.Linear, 64, 64), partial(_input, 1, 64))
    for tokens in (1, 64):
        yield Layer(f"32 experts, {tokens} tokens", partial(SwiGLUExperts, 32, 1024, 512), partial(_routed, tokens))
    attention = partial(nn.MultiheadAttention, 1024, 16, batch_first=True)
    yield Layer("MultiheadAttention 1024, 16 tokens", attention, partial(_same_three_times, 1, 16, 1024))
    encoder = partial(nn.TransformerEncoderLayer, 768, 12, 3072, batch_first=True)
    for tokens in (16, 128):
        yield Layer(f"TransformerEncoderLayer 768, {tokens} tokens", encoder, partial(_input, 1, tokens, 768))
    for steps in (1, 8, 100):
        lstm = partial(nn.LSTM, 512, 512, 2, batch_first=True)
        yield Layer(f"LSTM 512 x 2, sequence of {steps}", lstm, partial(_input, 1, steps, 512))
    yield Layer("GRU 1024, sequence of 1", partial(nn.GRU, 1024, 1024), partial(_input, 1, 1, 1024))
    for batch in (1, 8):
        conv = partial(nn.Conv2d, 256, 256, 3, padding=1)
        yield Layer(f"Conv2d 256 3x3 at 28x28, batch {batch}", conv, partial(_input, batch, 256, 28, 28))
    yield Layer("Conv2d 512 -> 2048 1x1 at 7x7", partial(nn.Conv2d, 512, 2048, 1), partial(_input, 1, 512, 7, 7))
    yield Layer("Conv1d 512 k3 on 200", partial(nn.Conv1d, 512, 512, 3, padding=1), partial(_input, 1, 512, 200))
    depthwise = partial(nn.Conv2d, 512, 512, 3, padding=1, groups=512)
    yield Layer("Conv2d depthwise 512 3x3 at 14x14", depthwise, partial(_input, 1, 512, 14, 14))
    yield Layer("Embedding 50k x 768, 64 rows", partial(nn.Embedding, 50_000, 768), partial(_indices, 64))


def _in_turn(model: nn.Module, inputs: Sequence[tuple[Tensor, ...]]) -> Call:
    """Run the inputs one after the other, so that tokens go to other experts than those before."""
    turns = itertools.cycle(inputs)
    return lambda: model(*next(turns))


@torch.no_grad()
def measure(report: Report, layer: Layer, rounds: int) -> None:
    model, inputs = layer.make().eval(), [layer.arguments() for _ in range(INPUTS)]
    calls: dict[str, Call] = {BASELINE: _in_turn(model, inputs)}
    where = {"layer": layer.name}
    for name, settings in VARIANTS.items():
        try:
            made = fewbits.quantize(model, validate=False, min_elements=0, skip_types=(), **settings).model.eval()
            calls[name] = _in_turn(made, inputs)
        except Exception as error:  # one failure must not stop the others
            report.failures.append(Failure(where, name, reason(error)))
    done = interleave(calls, rounds)
    report.failures += [Failure(where, name, why) for name, why in done.failures.items()]
    base = done.seconds.get(BASELINE, [])
    report.cells += [Cell(where, name, seconds, base) for name, seconds in done.seconds.items()]


def table(report: Report) -> str:
    lines = [("layer", "float ms", *VARIANTS)]
    for layer in dict.fromkeys(cell.case["layer"] for cell in report.cells):
        own = {cell.contender: cell for cell in report.cells if cell.case["layer"] == layer}
        ratios = [f"{own[name].speed:.2f}" if name in own else "-" for name in VARIANTS]
        lines.append((layer, f"{own[BASELINE].median * 1e3:.3f}", *ratios))
    return aligned(lines)


def checks(report: Report) -> list[str]:
    """State the rule for each layer, except for the exceptions."""
    at = {(cell.case["layer"], cell.contender): cell.median for cell in report.cells}
    return [
        said(f"{layer}, {name}: {at[layer, BASELINE] / seconds:.2f} times the speed of float", _holds(at, layer, name))
        for (layer, name), seconds in at.items()
        if name != BASELINE and not any(layer.startswith(a) and name in names for a, names in EXCEPTIONS.items())
    ]


def _holds(at: Mapping[tuple[str, str], float], layer: str, name: str) -> bool:
    return at[layer, name] <= at[layer, BASELINE] * (1 + SHARE) + SECONDS


def main(argv: Sequence[str] | None = None) -> int:
    made = cli.parser(__doc__, rounds=7)
    made.add_argument("--layer", default="", metavar="TEXT", help="only layers whose names contain this text")
    arguments = made.parse_args(argv)
    chosen = [layer for layer in layers() if arguments.layer.lower() in layer.name.lower()]
    if not chosen:
        made.error(f"no layer contains {arguments.layer!r}: {'; '.join(layer.name for layer in layers())}")
    report = cli.begin("layers", arguments)
    for layer in chosen:
        measure(report, layer, arguments.rounds)
        print(f"{layer.name} done", file=sys.stderr, flush=True)
    return cli.finish(report, table(report), arguments, checks(report))


if __name__ == "__main__":
    sys.exit(main())
