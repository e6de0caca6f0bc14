"""Find out which models and which of their parameters can be quantized, why others cannot, and how it would be done."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Hashable, Iterable, Iterator
from types import CodeType, FunctionType, SimpleNamespace

import attrs
import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from fewbits.errors import FewbitsError
from fewbits.nn.base import QuantizedModule, made_class, quantized_form, replaces_forward
from fewbits.nn.stored import SUFFIX, StoredWeight
from fewbits.nn.walk import slots
from fewbits.numerics.layout import Layout
from fewbits.numerics.plain import GATHER, not_plain, unplain_kind
from fewbits.selection.info import layout_by_shape

#: Containers, which treat all their children as content. `ParametrizationList` of torch inherits from one and does not;
#: `obstacle_to` knows it by name, because that module of torch must not be imported.
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

#: Names in a forward that goes through parameters instead of reading them by name.
_WALKS = frozenset({"parameters", "named_parameters", "_parameters", "state_dict", "_modules"})

#: The attributes in which every module keeps its tensors, children and hooks.
_MODULE_STATE = frozenset(vars(nn.Module()))

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
    for base in type(held).__mro__:
        is_float = issubclass(base, nn.Module) and _full_name(base).startswith(_FLOAT_MODULES)
        tool = next((tool for beginning, tool in _TOOLS.items() if _full_name(base).startswith(beginning)), None)
        if tool is not None and not is_float:
            return (
                f"{name or 'the root module'} is a {type(held).__name__} of {tool}: it is quantized already, or "
                "prepared for quantization; pass the float model that it was made from"
            )
    return None


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


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
        if problem := quantized_elsewhere(name, module):
            yield problem
        if _FSDP1 in map(_full_name, type(module).__mro__):
            yield f"{name or 'the root module'} is a {type(module).__name__}, whose parameters are sharded: {GATHER}"
    if quantized := [name for name, module in model.named_modules() if isinstance(module, QuantizedModule)]:
        more = f" and {len(quantized) - 1} more modules are" if quantized[1:] else " is"
        yield (
            f"{quantized[0] or 'the root module'}{more} quantized already; pass a float model, "
            "for example fewbits.dequantize(model)"
        )
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


def layout_of(module: nn.Module, name: str, weight: Tensor) -> tuple[Layout, bool]:
    """Say how a parameter is cut into outputs and inputs.

    Returns:
        The layout, and whether the class declares it; otherwise it follows from the shape.
    """
    shape = tuple(weight.shape)
    declared = quantized_form(type(module), [name])[0].declared_layout(module, name, shape)
    return (layout_by_shape(shape), len(shape) == 2) if declared is None else (declared, True)


def rounds_inputs(module: nn.Module, name: str, parent: nn.Module | None) -> bool:
    """Whether a module, once this parameter is quantized, rounds its inputs to int8 if the parameter's spec says so."""
    form, replaced = quantized_form(type(module), [name])
    if not form.rounds_inputs or name != form.own_weight or "forward" in vars(module):
        return False
    if parent is not None and quantized_form(type(parent), [])[0].reads_weights_of_children:
        return False
    return all(getattr(type(module), part) is getattr(replaced, part) for part in form.forward_methods)


def obstacle_to(module: nn.Module, name: str) -> str | None:
    """Say why this parameter of this module cannot be quantized; None if it can."""
    if isinstance(module, (QuantizedModule, StoredWeight)):
        return "it is quantized already"
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript modules cannot be changed; quantize the module it was made from"
    if isinstance(module, _CONTAINERS) and type(module).__name__ != "ParametrizationList":
        return f"{type(module).__name__} is a container, and would treat the stored weight as content"
    form, replaced = quantized_form(type(module), (name,))
    if not replaces_forward(type(module), form, replaced) and _goes_through_parameters(type(module)):
        return f"{type(module).__name__}.forward goes through its parameters, and would miss a quantized one"
    if hasattr(module, name + SUFFIX):
        return f"it has an attribute {name + SUFFIX}, where the quantized weight would go"
    if type(module._parameters.get(name)) is not nn.Parameter:
        return f"it is a {type(module._parameters.get(name)).__name__}, not a plain parameter"
    try:
        made_class(type(module), form, replaced)
    except Exception as error:  # a class may do anything when it is subclassed
        return f"{type(module).__name__} cannot be subclassed ({' '.join(str(error).split())})"
    return None


def _goes_through_parameters(cls: type[nn.Module]) -> bool:
    """Whether the forward of a class, or a method that it calls, goes through all parameters.

    Only names in the code are checked. Functions other than methods are not followed, and a name may be used for
    something harmless, so that some parameters are kept without need.
    """
    seen: set[CodeType] = set()
    codes = [getattr(inspect.unwrap(cls.forward), "__code__", None)]
    while codes:
        code = codes.pop()
        if code is None or code in seen:
            continue
        if not _WALKS.isdisjoint(code.co_names):
            return True
        seen.add(code)
        methods = [getattr(cls, name, None) for name in code.co_names]
        functions = [method for method in methods if isinstance(method, FunctionType)]
        # Methods of torch read parameters by name.
        codes += [f.__code__ for f in functions if not (f.__module__ or "").startswith("torch.")]
        codes += [const for const in code.co_consts if isinstance(const, CodeType)]
    return False


def held_beside(model: nn.Module) -> dict[str, str]:
    """Give a reason for each tensor whose memory an attribute of a module also holds: directly, in a list, as a view.

    Such a reference would keep using the float tensor. Attributes that the quantized module rebuilds do no harm.
    """
    parameters = {_memory(slot.tensor) for slot in slots(model) if slot.is_parameter} - {None}
    reasons: dict[Hashable, str] = {}
    for path, module in model.named_modules():
        ignored = _MODULE_STATE | quantized_form(type(module), ())[0].rebuilt_attributes
        for attribute, value in vars(module).items():
            # Spectral norm and pruning compute a weight from its original before every forward.
            if attribute in ignored or f"{attribute}_orig" in module._parameters:
                continue
            for tensor in _tensors_in(value):
                where = f"{path}.{attribute}" if path else attribute
                if _memory(tensor) in parameters:
                    reasons[_memory(tensor)] = f"{where} holds it too, and would keep using the float tensor"
    return {slot.name: reasons[_memory(slot.tensor)] for slot in slots(model) if _memory(slot.tensor) in reasons}


def _memory(tensor: Tensor) -> Hashable:
    """Identify the storage of a tensor; None if it has no memory or does not give its address."""
    with torch._C.DisableTorchFunctionSubclass():
        if not_plain(tensor) or not tensor.numel():
            return None
        return tensor.device, tensor.untyped_storage().data_ptr()


def _tensors_in(value: object, depth: int = 3) -> Iterator[Tensor]:
    """Yield the tensors in an attribute, and in containers, partial functions and namespaces a few levels deep."""
    if isinstance(value, functools.partial):
        value = [value.args, value.keywords]
    elif isinstance(value, SimpleNamespace) or attrs.has(type(value)) or dataclasses.is_dataclass(value):
        value = getattr(value, "__dict__", None)
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, (list, tuple, set, frozenset, dict)):
        for entry in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from _tensors_in(entry, depth - 1)
