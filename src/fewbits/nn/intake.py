"""Refuse models that another tool has changed: quantized, prepared for that, or sharded over processes."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from fewbits.errors import FewbitsError
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


def quantizing_tool(cls: type) -> str | None:
    """Name the tool whose quantized class this is or inherits from; None for other classes.

    Args:
        cls: the class of a module or of a tensor.
    """
    for base in cls.__mro__:
        name = f"{base.__module__}.{base.__qualname__}"
        if issubclass(base, nn.Module) and name.startswith(_FLOAT_MODULES):
            continue
        if name.startswith(tuple(_TOOLS)):
            return next(tool for beginning, tool in _TOOLS.items() if name.startswith(beginning))
    return None


def refuse_changed(model: nn.Module, error: type[FewbitsError]) -> None:
    """Refuse a model that another tool has quantized or sharded, or that holds tensors which are not plain.

    Tensors on the meta device and uninitialized tensors are accepted.

    Raises:
        FewbitsError: an error of the given class that names the first such module or tensor.
    """
    for problem in _problems(model):
        raise error(problem)


def quantized_elsewhere(name: str, held: object) -> str | None:
    """Return an error message if a module or tensor belongs to another quantization tool; None if not."""
    tool = quantizing_tool(type(held))
    if tool is None:
        return None
    return (
        f"{name or 'the root module'} is a {type(held).__name__} of {tool}: it is quantized already, or prepared "
        "for quantization; pass the float model that it was made from"
    )


def _problems(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if problem := quantized_elsewhere(name, module):
            yield problem
        if any(f"{base.__module__}.{base.__qualname__}" == _FSDP1 for base in type(module).__mro__):
            yield f"{name or 'the root module'} is a {type(module).__name__}, whose parameters are sharded: {GATHER}"
    for slot in slots(model):
        if problem := quantized_elsewhere(slot.name, slot.tensor):
            yield problem
        elif kind := unplain_kind(slot.tensor):
            yield f"{slot.name} {kind}"
