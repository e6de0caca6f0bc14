"""Compare allocations under a budget with one scheme for all tensors: same model, same data, same run.

All tensors count, embeddings and output layers included. Uniform schemes of at most the budget's size, and the
allocation with the same rounding strategy, are quantized, dequantized to float32, and compared with the float model as
in `benchmarks.quality`. With peers, llama.cpp's Q4_K_M is measured too, and an allocation of its size.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import nn

import fewbits
from benchmarks import cli, decoding, texts
from benchmarks.contender import linear
from benchmarks.quality import ONE_LEVEL, TASKS, TWO_LEVELS, Models, Task, llamacpp_layer, measure, table, with_q4_k_m
from benchmarks.report import Report
from benchmarks.sentences import PACKAGE

#: One scheme for all tensors.
UNIFORM: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "nf4 g32": ("nf4", TWO_LEVELS),
    "nf4 g64": ("nf4", ONE_LEVEL),
    "int4 g64": ("int4", ONE_LEVEL),
    "int4 g32": ("int4", TWO_LEVELS),
    "mxfp4": ("mxfp4", {}),
}

#: The bits per weight of each task's budget.
BUDGETS = {"language": 4.5, "sentences": 5.0}

#: Batches whose gradients are measured.
_GRADIENTS = 8


@attrs.frozen
class Whole:
    """A float model with all of its tensors quantized by one config."""

    config: fewbits.QuantizationConfig

    def models(self, task: Task) -> Models:
        needs_data = self.config.quantizer().rounding.needs != "nothing"
        result = fewbits.quantize(
            task.model,
            config=self.config,
            validate=False,
            compute="exact",
            data=task.calibration() if needs_data else None,
            samples=None,
        )
        yield "", fewbits.dequantize(result.model), bits_of(result.ledger)


@attrs.frozen
class Allocated:
    """A float model with the schemes that `fewbits.allocate` chooses."""

    budget: float
    rounding: str
    with_data: bool = True

    def models(self, task: Task) -> Models:
        data = task.calibration()[:_GRADIENTS] if self.with_data else None
        plan = fewbits.allocate(task.model, bits_per_weight=self.budget, data=data, samples=None)
        print(plan.summary(), file=sys.stderr)
        yield from Whole(plan.config.replace(rounding=self.rounding)).models(task)


def bits_of(ledger: fewbits.Ledger) -> float:
    """Count the bits of all tensors, over the number of all elements."""
    return 8 * ledger.bytes_after / sum(math.prod(row.shape) for row in ledger.stored)


def whole_q4_k_m(task: Task) -> Models:
    """Q4_K_M with its embedding, which is the output layer: 8 bits, because rows of 576 are no blocks of Q6_K."""
    for _, model, bits in with_q4_k_m(task):
        embedding = model.get_submodule("model.embed_tokens")
        layer = linear(embedding.weight.detach(), torch.float32)
        embedding.weight.data = llamacpp_layer("Q8_0", layer).weight.data
        yield "", model, _all_bits(model, bits, 8.5)


def _all_bits(model: nn.Module, of_linears: float, of_embedding: float) -> float:
    """Return the bits of all tensors, over the number of all elements; norms have 32 bits."""
    total = bits = 0.0
    for name, parameter in model.named_parameters():
        each = 32.0 if parameter.dim() < 2 else of_embedding if "embed" in name else of_linears
        total, bits = total + parameter.numel(), bits + each * parameter.numel()
    return bits / total


def makers(task: str, rounding: str, peers: bool) -> dict[str, Any]:
    """List what is measured for a task."""
    budget, found = BUDGETS[task], {}
    for name, (scheme, settings) in UNIFORM.items():
        if scheme != "mxfp4" or rounding == "nearest":
            rule = {"embeddings": "quantize", "rounding": rounding, **settings}
            found[f"uniform {name}"] = Whole(fewbits.QuantizationConfig(scheme=scheme, **rule)).models
    found[f"allocated {budget}"] = Allocated(budget, rounding).models
    found[f"allocated {budget}, no data"] = Allocated(budget, rounding, with_data=False).models
    if peers and task == "language":
        found["llama.cpp Q4_K_M"] = whole_q4_k_m
    return found


def main(argv: Sequence[str] | None = None) -> int:
    made = cli.parser(__doc__, rounds=None, check=False, peers=True)
    made.add_argument("--task", type=cli.listed(str), default=list(BUDGETS), help=f"of {', '.join(BUDGETS)}")
    made.add_argument("--rounding", default="qronos", help="the rounding strategy of all rows; qronos")
    made.add_argument("--windows", type=cli.positive, default=24, help="windows of 512 tokens to evaluate; 24")
    made.add_argument("--samples", type=cli.positive, default=32, help="windows or batches to calibrate with; 32")
    made.add_argument("--prose", type=Path, default=texts.PROSE, help="a text, to evaluate on")
    made.add_argument("--only", default="", metavar="TEXT", help="only the rows whose names contain a text")
    arguments = made.parse_args(argv)
    if unknown := [name for name in arguments.task if name not in BUDGETS]:
        made.error(f"unknown: {', '.join(unknown)}")
    report: Report = cli.begin("allocation", arguments, ["transformers", "gguf", decoding.PACKAGE, PACKAGE])
    for name in arguments.task:
        torch.manual_seed(arguments.seed)
        rows = makers(name, arguments.rounding, arguments.peers)
        task = TASKS[name](arguments)
        measure(report, task, {row: make for row, make in rows.items() if arguments.only in row})
        match_q4_k_m(report, name, task, arguments.rounding)
    return cli.finish(report, table(report), arguments)


def match_q4_k_m(report: Report, name: str, task: Task, rounding: str) -> None:
    """Measure an allocation of the size of Q4_K_M, if that was measured."""
    sizes = [row["bits"] for row in report.extra[name] if row["name"] == "llama.cpp Q4_K_M"]
    for bits in sizes:
        measure(report, task, {f"allocated {bits:.3f}": Allocated(bits, rounding).models})


if __name__ == "__main__":
    sys.exit(main())
