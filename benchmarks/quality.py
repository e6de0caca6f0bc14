"""Measure what models lose for each stored bit: fewbits' schemes and other libraries, same data, same run.

A model is quantized, dequantized to float32, and compared with the float model on data that no scheme has seen. Bits
per weight are the stored bytes of the quantized weights, with scales and zero points. Peers replace the same linear
layers; the bits of their weights are counted from their formats' definitions, with 16-bit scales.

The columns of language models are KL to the float model in nats per token, and perplexity.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import attrs
import torch
from torch import Tensor, nn

import fewbits
from benchmarks import cli, decoding, peers, texts
from benchmarks.contender import Contender, linear
from benchmarks.language import Language, Shifted
from benchmarks.peers import llamacpp
from benchmarks.report import Failure, Report, aligned
from benchmarks.scores import Scores
from benchmarks.sentences import PACKAGE, Sentences
from benchmarks.timing import reason
from benchmarks.vision import NETWORKS, Digits


class Task(Protocol):
    """A float model, data to calibrate it with, and a way to score its quantized forms."""

    name: str
    model: nn.Module
    #: Patterns of weights that stay as they are.
    kept: Sequence[str]

    def calibration(self) -> list[Any]: ...

    def held_out(self) -> list[Any]: ...

    def score(self, model: nn.Module) -> Scores: ...


#: Yields what was done since the last one, a model, and its bits per weight.
Models = Iterator[tuple[str, nn.Module, float]]


@attrs.frozen
class Variant:
    """A scheme with the settings of `fewbits.quantize`, the data that it sees, and the epochs of tuning.

    The data is "none", "given", or "self": text that a language model writes, which other tasks leave out.
    """

    scheme: str
    settings: Mapping[str, Any] = attrs.field(factory=dict)
    data: str = "none"
    epochs: int = 0

    def models(self, task: Task) -> Models:
        if self.data == "self" and not isinstance(task, Language):
            return
        makers = {"none": lambda: None, "given": task.calibration, "self": lambda: task.written()}
        data = makers[self.data]()
        result = fewbits.quantize(
            task.model,
            self.scheme,
            exclude=task.kept,
            validate=False,
            compute="exact",
            data=data,
            samples=None,
            **self.settings,
        )
        rows = [row for row in result.ledger if row.fate == "quantized"]
        bits = 8 * sum(row.bytes_after for row in rows) / sum(math.prod(row.shape) for row in rows)
        yield "", fewbits.dequantize(result.model), bits
        if data is not None and self.epochs:
            held_out = task.held_out()
            fewbits.tune(result.model, task.model, data, epochs=self.epochs, held_out=held_out, samples=None)
            yield "tuned", fewbits.dequantize(result.model), bits


#: Scales of 16 bits in groups of 64; or codes of 6 bits for groups of 32, and a scale of 16 bits for each row.
ONE_LEVEL = {"scale_dtype": "float16", "group_size": 64}
TWO_LEVELS = {"scale_dtype": "float16", "group_size": 32, "scale_bits": 6}

VARIANTS: Mapping[str, Variant] = {
    "int8": Variant("int8", {"scale_dtype": "float16"}),
    "nf4 g64": Variant("nf4", ONE_LEVEL),
    "nf4 g64 scale-search": Variant("nf4", {**ONE_LEVEL, "rounding": "scale-search"}),
    "nf4 g32": Variant("nf4", TWO_LEVELS),
    "nf4 g32 scale-search": Variant("nf4", {**TWO_LEVELS, "rounding": "scale-search"}),
    "mxfp4": Variant("mxfp4"),
    "int4 g64": Variant("int4", ONE_LEVEL),
    "int4 g64 gptq": Variant("int4", {**ONE_LEVEL, "rounding": "gptq"}, "given"),
    "int4 g64 qronos": Variant("int4", {**ONE_LEVEL, "rounding": "qronos"}, "given"),
    "nf4 g64 qronos": Variant("nf4", {**ONE_LEVEL, "rounding": "qronos"}, "given"),
    "nf4 g32 qronos": Variant("nf4", {**TWO_LEVELS, "rounding": "qronos"}, "given", epochs=1),
    "nf4 g32 qronos self": Variant("nf4", {**TWO_LEVELS, "rounding": "qronos"}, "self"),
    "int3 g64 qronos": Variant("int3", {**ONE_LEVEL, "rounding": "qronos"}, "given", epochs=3),
}

#: Bits per weight of peers' formats, by the beginning of their names. A scale of 32 bits for each row adds 0.05 bits to
#: the layers of SmolLM2; bitsandbytes has a scale of 32 bits for every 64 weights, hqq a scale and a zero point of 16.
PEER_BITS = {
    "hqq 4 bit g64": 4.5,
    "bitsandbytes nf4": 4.5,
    "bitsandbytes int8": 8.05,
    "torchao int8": 8.05,
    "torchao intx int4": 4.125,
    "quanto qint8": 8.05,
    "quanto qint4": 4.25,
    "llama.cpp Q8_0": 8.5,
    "llama.cpp Q4_0": 4.5,
}


class Replaced(nn.Module):
    """A linear layer that a peer runs, with the bias that peers' benchmarks leave out."""

    def __init__(self, run: Callable[[Tensor], Tensor], bias: Tensor | None) -> None:
        super().__init__()
        self._run, self._bias = run, bias

    def forward(self, x: Tensor) -> Tensor:
        # Some peers take matrices only.
        output = self._run(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
        return output if self._bias is None else output + self._bias


def with_peer(contender: Contender, task: Task) -> Models:
    """Replace the linear layers of a copy of the model; convolutions and kept layers stay float."""
    if contender.build is None:
        raise ValueError("it has no layer to run")
    model = copy.deepcopy(task.model)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and not any(fnmatch(name, pattern) for pattern in task.kept):
            parent, _, child = name.rpartition(".")
            run = contender.build(linear(module.weight.detach(), contender.dtype))
            setattr(model.get_submodule(parent), child, Replaced(run, module.bias))
    yield "", model, next(bits for start, bits in PEER_BITS.items() if contender.name.startswith(start))


def llamacpp_layer(name: str, layer: nn.Linear) -> nn.Linear:
    """Quantize with ggml, and dequantize: llama.cpp itself would round inputs to 8 bits too."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    encoded = llamacpp.encoded(name, layer)
    values = dequantize(encoded.numpy(), GGMLQuantizationType[name])
    return linear(torch.from_numpy(values).view(layer.weight.shape), torch.float32)


def with_q4_k_m(task: Task) -> Models:
    """Replace the layers of a language model by llama.cpp's mixture of types."""
    model, bits, count = copy.deepcopy(task.model), 0.0, 0
    blocks = len(model.get_submodule("model.layers"))
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and not any(fnmatch(name, pattern) for pattern in task.kept):
            kind = llamacpp.q4_k_m(name, module.in_features, int(name.split(".")[2]), blocks)
            module.weight.data = llamacpp_layer(kind, module).weight.data
            bits, count = bits + llamacpp.TYPES[kind].bits * module.weight.numel(), count + module.weight.numel()
    yield "", model, bits / count


def peer_contenders() -> list[Contender]:
    found = [c for c in peers.contenders([torch.float32], 128) if any(c.name.startswith(start) for start in PEER_BITS)]
    return [_with_layer(contender) for contender in found]


def _with_layer(contender: Contender) -> Contender:
    """Give llama.cpp's formats a layer to run."""
    if contender.package != llamacpp.PACKAGE:
        return contender
    return attrs.evolve(contender, build=partial(llamacpp_layer, contender.name.removeprefix("llama.cpp ")))


def measure(report: Report, task: Task, makers: Mapping[str, Callable[[Task], Models]]) -> None:
    """Add a row to the report for each quantized model, with the seconds that it took."""
    rows = report.extra.setdefault(task.name, [{"name": "float", "bits": 32, "seconds": 0, **task.score(task.model)}])
    for name, make in makers.items():
        begin = time.perf_counter()
        try:
            for step, model, bits in make(task):
                seconds = time.perf_counter() - begin
                rows.append({"name": f"{name} {step}".strip(), "bits": bits, "seconds": seconds, **task.score(model)})
                print(f"{task.name}: {rows[-1]}", file=sys.stderr, flush=True)
                begin = time.perf_counter()
        except Exception as error:  # one failure must not stop the others
            report.failures.append(Failure({"task": task.name}, name, reason(error)))


def table(report: Report) -> str:
    return "\n\n".join(_table(name, report.extra[name]) for name in TASKS if name in report.extra)


def _table(task: str, rows: Sequence[Mapping[str, Any]]) -> str:
    figures = [key for key in rows[0] if key not in ("name", "bits", "seconds")]
    lines = [(task, "bits per weight", *figures, "seconds")]
    lines += [
        (row["name"], f"{row['bits']:.3f}", *(f"{row[key]:.4f}" for key in figures), f"{row['seconds']:.0f}")
        for row in rows
    ]
    return aligned(lines)


#: Makes each task from the arguments.
TASKS: Mapping[str, Callable[[argparse.Namespace], Task]] = {
    "language": lambda arguments: Language(arguments.prose, arguments.windows, arguments.samples),
    "shifted": lambda arguments: Shifted(arguments.prose, arguments.windows, arguments.samples),
    "sentences": lambda arguments: Sentences(arguments.prose, arguments.samples),
    **{name: (lambda arguments, name=name: Digits(name, arguments.samples)) for name in NETWORKS},
}

#: The tasks that run if none are named.
USUAL = [name for name in TASKS if name != "shifted"]


def main(argv: Sequence[str] | None = None) -> int:
    made = cli.parser(__doc__, rounds=None, check=False, peers=True)
    made.add_argument("--task", type=cli.listed(str), default=USUAL, help=f"of {', '.join(TASKS)}; all but shifted")
    made.add_argument("--variant", type=cli.listed(str), default=list(VARIANTS), metavar="NAME,...")
    made.add_argument("--windows", type=cli.positive, default=24, help="windows of 512 tokens to evaluate; 24")
    made.add_argument("--samples", type=cli.positive, default=32, help="windows or batches to calibrate with; 32")
    made.add_argument("--prose", type=Path, default=texts.PROSE, help="a text, to evaluate on")
    made.add_argument("--list", action="store_true", help="print the variants, and stop")
    arguments = made.parse_args(argv)
    if arguments.list:
        print("\n".join(f"{name}: {variant}" for name, variant in VARIANTS.items()))
        return 0
    unknown = [*({*arguments.task} - {*TASKS}), *({*arguments.variant} - {*VARIANTS})]
    if unknown:
        made.error(f"unknown: {', '.join(unknown)}; see --list")
    report = cli.begin("quality", arguments, ["transformers", "gguf", decoding.PACKAGE, PACKAGE])
    makers = {f"fewbits {name}": VARIANTS[name].models for name in arguments.variant}
    if arguments.peers:
        makers |= {c.name.removesuffix(", fp32"): partial(with_peer, c) for c in peer_contenders()}
    for name in arguments.task:
        torch.manual_seed(arguments.seed)
        peers_of_task = {"llama.cpp Q4_K_M": with_q4_k_m} if arguments.peers and name == "language" else {}
        measure(report, TASKS[name](arguments), makers | peers_of_task)
    return cli.finish(report, table(report), arguments)


if __name__ == "__main__":
    sys.exit(main())
