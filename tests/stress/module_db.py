"""Quantize every module of torch's own test database with every scheme: ``python tests/stress/module_db.py``.

A case is one constructor, one input, one dtype and one scheme. It passes if the quantized module agrees
with its dequantized copy, and with itself after deepcopy, pickle and a file. A refusal by an
error of fewbits counts as refused, with its reason; everything else is a failure. Needs ``expecttest``, as torch's
tests do. The exit code is 1 if a case failed.

Two losses have thousands of inputs that differ only in the options of the loss. Of each module and dtype at most 64
inputs are tried, evenly spread; ``--all`` tries all.
"""

import collections
import copy
import pickle
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing._internal.common_modules import ModuleInfo, ModuleInput, module_db

import fewbits

SCHEMES: dict[str, dict[str, Any]] = {
    "int8": {"scheme": "int8"},
    "int8-tensor": {"scheme": "int8-tensor"},
    "int8 dynamic": {"scheme": "int8", "activations": "dynamic"},
    "int4": {"scheme": "int4", "group_size": 32},
    "int4 asymmetric": {"scheme": "int4", "group_size": 32, "symmetric": False},
    "int3": {"scheme": "int3", "group_size": 32},
    "nf4": {"scheme": "nf4", "group_size": 32},
    "nf4, two levels of scales": {"scheme": "nf4", "group_size": 32, "scale_bits": 6},
    "mxfp4": {"scheme": "mxfp4"},
    "fp8": {"scheme": "fp8"},
    "fp16": {"scheme": "fp16"},
}
MOST_INPUTS = 64
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def cases(most: int) -> Iterator[tuple[str, ModuleInfo, ModuleInput, torch.dtype]]:
    """Every module of the database, with at most so many inputs for each dtype."""
    for info in module_db:
        for dtype in (dtype for dtype in info.dtypes if dtype in DTYPES):
            inputs = inputs_of(info, dtype)
            for number in range(0, len(inputs), -(-len(inputs) // most)):
                one = inputs[number]
                yield f"{info.name} {dtype} #{number} {one.desc}", info, one, dtype


def inputs_of(info: ModuleInfo, dtype: torch.dtype) -> list[ModuleInput]:
    return info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=False, training=False)


def build(info: ModuleInfo, one: ModuleInput, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    made = one.constructor_input
    return info.module_cls(*made.args, **made.kwargs).to(dtype).eval()


def call(module: nn.Module, one: ModuleInput) -> list[Tensor]:
    """The tensors of a forward, each time from the same inputs and the same random numbers."""
    given = copy.deepcopy(one.forward_input)
    torch.manual_seed(1)
    with torch.no_grad():
        return list(tensors(module(*given.args, **given.kwargs)))


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors(part)


def is_called(build: Callable[[], nn.Module], one: ModuleInput) -> bool:
    """Whether the float module itself takes this input: some cases of the database are errors, or need training."""
    try:
        call(build(), one)
    except Exception:
        return False
    return True


def check(info: ModuleInfo, one: ModuleInput, dtype: torch.dtype, settings: dict[str, Any], folder: Path) -> None:
    """Run one case.

    Raises:
        fewbits.FewbitsError: if fewbits refuses it.
        AssertionError: if a promise is broken.
    """
    model = build(info, one, dtype)
    lazy = any(nn.parameter.is_lazy(parameter) for parameter in model.parameters())
    if lazy:
        call(model, one)
    result = fewbits.quantize(model, **settings, min_elements=0, skip_types=(), compute="exact", on_failure="ignore")
    quantized = result.model
    output = call(quantized, one)
    if settings.get("activations") is None:  # a dequantized copy does not round its inputs
        same(output, call(fewbits.dequantize(quantized), one), "its dequantized copy")
    same(output, call(copy.deepcopy(quantized), one), "its deep copy")
    same(output, call(pickle.loads(pickle.dumps(quantized)), one), "its pickled copy")
    path = folder / "case.safetensors"
    result.save(path)
    fresh = build(info, one, dtype)
    if lazy:
        call(fresh, one)
    same(output, call(fewbits.load(path, into=fresh, compute="exact"), one), "the module loaded from its file")


def same(output: list[Tensor], other: list[Tensor], what: str) -> None:
    """Compare two outputs. Torch may take another path for a float module than for ours, which rounds otherwise.

    Raises:
        AssertionError: if they differ by more than rounding.
    """
    for one, two in zip(output, other, strict=True):
        torch.testing.assert_close(one, two, equal_nan=True, msg=lambda said: f"differs from {what}: {said}")


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def main() -> int:
    """Run all cases, or those whose names contain one of the arguments."""
    warnings.simplefilter("ignore")
    wanted = [part for part in sys.argv[1:] if part != "--all"]
    most = sys.maxsize if "--all" in sys.argv else MOST_INPUTS
    found: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in SCHEMES}
    refused: collections.Counter[str] = collections.Counter()
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        for name, info, one, dtype in cases(most):
            if wanted and not any(part in name for part in wanted):
                continue
            if not is_called(lambda info=info, one=one, dtype=dtype: build(info, one, dtype), one):
                for scheme in SCHEMES:
                    found[scheme]["the float module raises"] += 1
                continue
            for scheme, settings in SCHEMES.items():
                outcome = "passed"
                try:
                    check(info, one, dtype, settings, Path(folder))
                except fewbits.FewbitsError as error:
                    nothing = isinstance(error, fewbits.errors.SelectionError) and "nothing is left" in str(error)
                    outcome = "nothing to quantize" if nothing else "refused"
                    if not nothing:
                        refused[f"{info.name}, {scheme}: {first_line(error)}"] += 1
                except Exception as error:
                    outcome = "failed"
                    failed.append(f"{name}, {scheme}: {first_line(error)}")
                found[scheme][outcome] += 1
    for scheme, outcomes in found.items():
        print(f"{scheme}: {sum(outcomes.values())} cases: " + ", ".join(f"{n} {what}" for what, n in outcomes.items()))
    for reason, number in refused.items():
        print(f"refused, {number} times: {reason}")
    for reason in failed:
        print(f"FAILED {reason}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
