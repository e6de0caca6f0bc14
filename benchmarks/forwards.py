"""Time one forward of whole models: a sentence encoder, five convolutional networks, and an LSTM.

Contenders take turns in one run. Each has the cosine of its output with that of the float model beside its time.
Quantizing, exporting and compiling are not timed.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn

import fewbits
from benchmarks import cli, networks, runtimes
from benchmarks.networks import Network
from benchmarks.report import Cell, Failure, Report, aligned
from benchmarks.timing import compile_alone, interleave, reason

BASELINE = "float32"

#: Computes one forward.
Forward = Callable[..., Tensor]
#: Makes a forward of a copy of the model, for these inputs.
Build = Callable[[nn.Module, tuple[Tensor, ...]], Forward]


@attrs.frozen
class InTorch:
    """The model in torch: its dtype, the settings of `fewbits.quantize`, and whether it is compiled."""

    dtype: torch.dtype = torch.float32
    settings: Mapping[str, Any] | None = None
    compiled: bool = False

    def __call__(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> Forward:
        model = model.to(self.dtype)
        if self.settings is not None:
            model = fewbits.quantize(model, validate=False, inplace=True, **self.settings).model
        called: Any = compile_alone(model.forward) if self.compiled else model

        @torch.no_grad()
        def forward(*values: Tensor) -> Tensor:
            output: Tensor = called(*(x.to(self.dtype) if x.is_floating_point() else x for x in values))
            return output.float()

        return forward


_INT8, _INT4 = {"scheme": "int8"}, {"scheme": "int4"}
_DYNAMIC = {"scheme": "int8", "activations": "dynamic"}

#: What every network is tried with.
EAGER: Mapping[str, Build] = {
    BASELINE: InTorch(),
    "bfloat16": InTorch(torch.bfloat16),
    "int8": InTorch(settings=_INT8),
    "int8, dynamic inputs": InTorch(settings=_DYNAMIC),
    "int4": InTorch(settings=_INT4),
    "int8, bfloat16": InTorch(torch.bfloat16, _INT8),
}
COMPILED: Mapping[str, Build] = {
    "bfloat16, compiled": InTorch(torch.bfloat16, compiled=True),
    "int8, compiled": InTorch(settings=_INT8, compiled=True),
    "int8, dynamic inputs, compiled": InTorch(settings=_DYNAMIC, compiled=True),
    "int8, bfloat16, compiled": InTorch(torch.bfloat16, _INT8, compiled=True),
    "int8, dynamic inputs, bfloat16, compiled": InTorch(torch.bfloat16, _DYNAMIC, compiled=True),
}

NETWORKS: Mapping[str, tuple[Callable[[], list[Network]], Mapping[str, Build]]] = {
    "encoders": (networks.encoders, {**EAGER, **COMPILED}),
    "convolutional": (networks.convolutional, EAGER),
    "recurrent": (networks.recurrent, EAGER),
}


def measure(report: Report, network: Network, builds: Mapping[str, Build], rounds: int) -> None:
    """Build the contenders of one network, compare their outputs, and time them in turns."""
    where, forwards = {"network": network.name}, {}
    outputs: dict[str, Tensor] = {}
    for name, build in builds.items():
        try:
            forward = build(copy.deepcopy(network.model), network.inputs)
            outputs[name], forwards[name] = forward(*network.inputs), partial(forward, *network.inputs)
        except Exception as error:  # one failure must not stop the others
            report.failures.append(Failure(where, name, reason(error)))
    if BASELINE not in forwards:
        return
    done = interleave(forwards, rounds)
    report.failures += [Failure(where, name, why) for name, why in done.failures.items()]
    base = done.seconds.get(BASELINE, [])
    for name, seconds in done.seconds.items():
        report.cells.append(Cell(where, name, seconds, base, {"cosine": cosine(outputs[name], outputs[BASELINE])}))


def cosine(found: Tensor, reference: Tensor) -> float:
    """The mean cosine of the rows of two outputs."""
    return float(nn.functional.cosine_similarity(found.double(), reference.double(), dim=-1).mean())


def table(report: Report) -> str:
    lines = [("network", "contender", "ms", "times float32", "cosine")]
    for cell in report.cells:
        found = f"{cell.facts['cosine']:.4f}"
        lines.append((cell.case["network"], cell.contender, f"{cell.median * 1e3:.2f}", f"{cell.speed:.2f}", found))
    return aligned(lines)


def main(argv: Sequence[str] | None = None) -> int:
    made = cli.parser(__doc__, check=False)
    made.add_argument("--networks", choices=NETWORKS, action="append", help="which networks; all unless given")
    made.add_argument("--peers", action="store_true", help="time onnxruntime and OpenVINO on the encoder")
    arguments = made.parse_args(argv)
    report = cli.begin("forwards", arguments, runtimes.PACKAGES if arguments.peers else ())
    with tempfile.TemporaryDirectory() as folder:
        for kind in arguments.networks or NETWORKS:
            make, builds = NETWORKS[kind]
            others = runtimes.builds(Path(folder)) if arguments.peers and kind == "encoders" else {}
            for network in make():
                measure(report, network, {**builds, **others}, arguments.rounds)
                print(f"{network.name} done", file=sys.stderr, flush=True)
    return cli.finish(report, table(report), arguments)


if __name__ == "__main__":
    sys.exit(main())
