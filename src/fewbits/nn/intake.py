"""Refuse models whose layers cannot be quantized where they are.

These are TorchScript modules, wrappers that run in parallel, models that are quantized already, and models that another
tool has quantized, prepared for that, or sharded over processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from fewbits.errors import FewbitsError
from fewbits.nn.base import QuantizedModule
from fewbits.nn.walk import slots
from fewbits.numerics.plain import GATHER, unplain_kind

#: Packages of other tools whose classes hold or simulate quantized weights, by prefix of the full class name. Nothing
#: is imported.
_TOOLS = {
    "torchao.": "torchao",
    "optimum.quanto.": "quanto",
    "quanto.": "quanto",
    "bitsandbytes.": "bitsandbytes",
    "hqq.": "HQQ",
    "torch.ao.nn.quantized.": "torch.ao",
    "torch.ao.nn.intrinsic.quantized.": "torch.ao",
    "torch.ao.nn.sparse.quantized.": "torch.ao",
    "torch.ao.nn.qat.": "torch.ao",
    "torch.ao.nn.intrinsic.qat.": "torch.ao",
    "torch.ao.quantization.fake_quantize.": "torch.ao",
}

#: Classes in these packages that float models use, too.
_FLOAT_MODULES = ("torch.ao.nn.quantized.modules.functional_modules.", "bitsandbytes.nn.")

_FSDP1 = "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel"

#: The child in which `torch.compile(model)` holds the model; it is part of the names of all tensors.
COMPILED = "_orig_mod"


def refuse_unfit(model: nn.Module, error: type[FewbitsError]) -> None:
    """Refuse a model whose layers cannot be quantized where they are, or that holds tensors which are not plain.

    Tensors on the meta device and uninitialized tensors are accepted. A TorchScript module inside of a model is
    accepted, too: its weights are kept, with the reason in the ledger.

    Raises:
        FewbitsError: An error of the given class that names the first such module or tensor, and what to pass instead.
    """
    for problem in _problems(model):
        raise error(problem)


def quantized_elsewhere(name: str, held: object) -> str | None:
    """Return an error message if a module or tensor belongs to another quantization tool; None if not."""
    for full_name, base in _bases(held):
        if full_name.startswith(tuple(_TOOLS)) and not (
            issubclass(base, nn.Module) and full_name.startswith(_FLOAT_MODULES)
        ):
            tool = next(tool for beginning, tool in _TOOLS.items() if full_name.startswith(beginning))
            return (
                f"{name or 'the root module'} is a {type(held).__name__} of {tool}: it is quantized already, or "
                "prepared for quantization; pass the float model that it was made from"
            )
    return None


def _bases(held: object) -> list[tuple[str, type]]:
    """Return the classes of an object, with their full names."""
    return [(f"{base.__module__}.{base.__qualname__}", base) for base in type(held).__mro__]


def _problems(model: nn.Module) -> Iterator[str]:
    if isinstance(model, torch.jit.ScriptModule):
        yield (
            f"the model is a TorchScript module ({type(model).__name__}), whose layers cannot be replaced; pass the "
            "nn.Module that it was made from, before torch.jit.script or torch.jit.trace"
        )
    for name, module in model.named_modules():
        if isinstance(module, (DataParallel, DistributedDataParallel)):
            way = f"put model.{name}.module in its place" if name else "pass model.module, and wrap the result"
            yield f"{name or 'the model'} is wrapped in {type(module).__name__}; {way}"
    if quantized := [name for name, module in model.named_modules() if isinstance(module, QuantizedModule)]:
        more = f" and {len(quantized) - 1} more modules are" if quantized[1:] else " is"
        yield (
            f"{quantized[0] or 'the root module'}{more} quantized already; pass a float model, "
            "for example fewbits.dequantize(model)"
        )
    for name, module in model.named_modules():
        if problem := quantized_elsewhere(name, module):
            yield problem
        if any(full_name == _FSDP1 for full_name, _ in _bases(module)):
            yield f"{name or 'the root module'} is a {type(module).__name__}, whose parameters are sharded: {GATHER}"
    for slot in slots(model):
        if problem := quantized_elsewhere(slot.name, slot.tensor):
            yield problem
        elif kind := unplain_kind(slot.tensor):
            yield f"{slot.name} {kind}"


def compiled_hint(model: nn.Module, missed: Iterable[str]) -> str:
    """Explain names of a file that a model does not have, if only one of the two comes from a compiled model.

    Returns:
        The model to load into instead, in parentheses; "" if there is another cause.
    """
    if COMPILED in model._modules:
        return f" (the model is a compiled one: load into model.{COMPILED})"
    if any(name.startswith(f"{COMPILED}.") for name in missed):
        return " (the file was made from a compiled model: load into torch.compile(model))"
    return ""
