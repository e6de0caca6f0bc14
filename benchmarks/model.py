"""Time SmolLM2-135M decoding: dense, by fewbits, and by llama.cpp, in one run.

Each contender decodes 64 tokens greedily after a prompt of 20. Torch decodes eagerly, through transformers' `generate`
with a static cache, or with ``--loop`` in a bare loop of forwards; a compiled contender always in the loop, with one
graph for the prompt and one for a token. llama.cpp decodes through the xllamacpp wheel, with layers in Q8_0 or Q4_0
made from the same weights. The time of one token counts from the first token to the last. The time of the prompt is
measured in a loop, and by llama.cpp. Contenders take turns in every round.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import nn

import fewbits
from benchmarks import cli, decoding
from benchmarks.contender import missing
from benchmarks.decoding import Decoded, LlamaCpp, Loop, generate
from benchmarks.peers import llamacpp
from benchmarks.report import Cell, Failure, Report, aligned, said
from benchmarks.timing import PAUSE, reason, rotated

BASELINE = "dense fp32"

#: Decodes this number of tokens.
Decode = Callable[[int], Decoded]


@attrs.frozen
class Variant:
    """The dtype and scheme of the model in torch, with settings of `fewbits.quantize`, eager or compiled."""

    dtype: torch.dtype = torch.float32
    scheme: str | None = None
    settings: Mapping[str, Any] = attrs.field(factory=dict)
    compiled: bool = False

    def of(self, model: nn.Module) -> nn.Module:
        held = copy.deepcopy(model).to(self.dtype)
        if self.scheme is None:
            return held
        quantized: nn.Module = fewbits.quantize(held, self.scheme, validate=False, inplace=True, **self.settings).model
        return quantized


#: The embedding is the output layer here. int4 keeps it by default.
_SMALL = {"embeddings": "int8"}
_ROUNDED = {"embeddings": "int8", "compute": "int8"}
VARIANTS: Mapping[str, Variant] = {
    BASELINE: Variant(),
    "dense bf16": Variant(torch.bfloat16),
    "fewbits int8": Variant(scheme="int8"),
    "fewbits int4": Variant(scheme="int4"),
    "fewbits int4, output int8": Variant(scheme="int4", settings=_SMALL),
    "fewbits int4, output int8, int8 inputs": Variant(scheme="int4", settings=_ROUNDED),
    "fewbits int4, output int8, int8 inputs, bf16": Variant(torch.bfloat16, "int4", _ROUNDED),
    "fewbits int8, bf16": Variant(torch.bfloat16, "int8"),
    "fewbits int4, output int8, bf16": Variant(torch.bfloat16, "int4", _SMALL),
    "dense fp32, compiled": Variant(compiled=True),
    "dense bf16, compiled": Variant(torch.bfloat16, compiled=True),
    "fewbits int8, compiled": Variant(scheme="int8", compiled=True),
    "fewbits int4, output int8, compiled": Variant(scheme="int4", settings=_SMALL, compiled=True),
    "fewbits int4, output int8, int8 inputs, compiled": Variant(scheme="int4", settings=_ROUNDED, compiled=True),
    "fewbits int4, output int8, int8 inputs, bf16, compiled": Variant(torch.bfloat16, "int4", _ROUNDED, True),
    "fewbits int8, bf16, compiled": Variant(torch.bfloat16, "int8", compiled=True),
    "fewbits int4, output int8, bf16, compiled": Variant(torch.bfloat16, "int4", _SMALL, compiled=True),
}
DENSE = (BASELINE, "dense bf16")
#: Contenders that must be faster than both dense models.
PROMISED = ("fewbits int8", "fewbits int4")
LLAMA = {"llama.cpp Q8_0": "Q8_0", "llama.cpp Q4_0": "Q4_0"}


def measure(report: Report, decoders: Mapping[str, Decode], tokens: int, rounds: int) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    prompts: dict[str, list[float]] = {name: [] for name in decoders}
    last: dict[str, Decoded] = {}
    where = {"tokens": tokens}
    for r in range(-1, rounds):  # the first round warms up, with a few tokens
        for name in rotated(list(seconds), r):
            time.sleep(PAUSE)
            try:
                last[name] = decoders[name](min(tokens, 8) if r < 0 else tokens)
                if r >= 0:
                    seconds[name].append(last[name].seconds)
                    if (seconds_of_prompt := last[name].prompt) is not None:
                        prompts[name].append(seconds_of_prompt)
            except Exception as error:  # one failure must not stop the others
                report.failures.append(Failure(where, name, reason(error)))
                del seconds[name]
    for name, times in seconds.items():
        facts = {"agrees": _agreement(last[name], last.get(BASELINE)), "text": last[name].text}
        if prompts[name]:
            facts["prompt"] = statistics.median(prompts[name])
        report.cells.append(Cell(where, name, times, seconds.get(BASELINE, ()), facts))


def _agreement(decoded: Decoded, reference: Decoded | None) -> int | None:
    if reference is None or not decoded.tokens:
        return None
    same = [a == b for a, b in zip(decoded.tokens, reference.tokens, strict=True)]
    return same.index(False) if False in same else len(same)


def dense_and_ours(report: Report, model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    made = {}
    for name in names:
        try:
            made[name] = VARIANTS[name].of(model)
        except Exception as error:  # one failure must not stop the others
            report.failures.append(Failure({}, name, reason(error)))
    return made


def decoder(model: nn.Module, prompt: Sequence[int], tokens: int, *, loop: bool, compiled: bool) -> Decode:
    if loop or compiled:
        return partial(Loop(model, len(prompt) + tokens, compiled=compiled).generate, prompt)
    return partial(generate, model, prompt)


def llamas(report: Report, folder: Path, prompt: Sequence[int], threads: int) -> dict[str, Decode]:
    made: dict[str, Decode] = {}
    for name, kind in {} if missing(llamacpp.MODULES) else LLAMA.items():
        try:
            server = LlamaCpp(decoding.rewrite(kind, folder / f"{kind}.gguf"), threads)
            made[name] = partial(server.generate, prompt)
        except Exception as error:  # one failure must not stop the others
            report.failures.append(Failure({}, name, reason(error)))
    return made


def table(report: Report) -> str:
    lines = [("one token", "ms", "±", "tokens/s", "x fp32", "prompt, ms", "same tokens")]
    lines += [
        (
            cell.contender,
            f"{cell.median * 1e3:.1f}",
            f"{cell.spread * 50:.0f}%",
            f"{1 / cell.median:.1f}",
            f"{cell.speed:.2f}",
            f"{cell.facts['prompt'] * 1e3:.0f}" if "prompt" in cell.facts else "-",
            "-" if cell.facts["agrees"] is None else str(cell.facts["agrees"]),
        )
        for cell in report.cells
    ]
    return aligned(lines)


def checks(report: Report) -> list[str]:
    at = {cell.contender: cell for cell in report.cells}
    pairs = [(own, other) for own in PROMISED for other in DENSE if own in at and other in at]
    found = [(own, other, at[other].median / at[own].median) for own, other in pairs]
    return [said(f"{own} faster than {other}, found {times:.2f} times", times > 1) for own, other, times in found]


def main(argv: Sequence[str] | None = None) -> int:
    made = cli.parser(__doc__, rounds=5, peers=True)
    made.add_argument("--tokens", type=cli.positive, default=64, help="tokens to decode; 64")
    made.add_argument("--prompt", type=cli.positive, default=len(decoding.PROMPT), help="tokens of the prompt; 20")
    made.add_argument("--loop", action="store_true", help="decode eagerly in a bare loop too, without `generate`")
    made.add_argument("--variant", type=lambda text: text.split(";"), default=list(VARIANTS), metavar="NAME;...")
    arguments = made.parse_args(argv)
    unknown = [name for name in arguments.variant if name not in VARIANTS]
    if unknown:
        made.error(f"--variant of {'; '.join(VARIANTS)}; not {'; '.join(unknown)}")
    if arguments.tokens < 2 or arguments.tokens + arguments.prompt > decoding.CONTEXT:
        made.error(f"--tokens must be 2 or more, and --tokens plus --prompt at most {decoding.CONTEXT}")
    report = cli.begin("model", arguments, ["transformers", "gguf", decoding.PACKAGE])
    models = dense_and_ours(report, decoding.load(), arguments.variant)
    loop, tokens = arguments.loop, arguments.tokens
    prompt = tuple(itertools.islice(itertools.cycle(decoding.PROMPT), arguments.prompt))
    decoders = {n: decoder(m, prompt, tokens, loop=loop, compiled=VARIANTS[n].compiled) for n, m in models.items()}
    with tempfile.TemporaryDirectory() as folder:
        if arguments.peers:
            decoders |= llamas(report, Path(folder), prompt, arguments.threads)
        measure(report, decoders, arguments.tokens, arguments.rounds)
    return cli.finish(report, table(report), arguments, checks(report))


if __name__ == "__main__":
    sys.exit(main())
