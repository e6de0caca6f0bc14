"""Find out how a parameter would be quantized, or why it cannot be: its module, its forward, other references."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Hashable, Iterator
from types import CodeType, FunctionType, SimpleNamespace

import attrs
import torch
from torch import Tensor, nn

from fewbits.nn.base import QuantizedModule, made_class, quantized_form, replaces_forward
from fewbits.nn.stored import SUFFIX, StoredWeight
from fewbits.nn.walk import slots
from fewbits.numerics.layout import Layout
from fewbits.numerics.plain import not_plain
from fewbits.selection.info import layout_by_shape

#: Containers, which treat all their children as content. `ParametrizationList` of torch inherits from one and does not;
#: `obstacle_to` knows it by name, because that module of torch must not be imported.
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

#: Names in a forward that goes through parameters instead of reading them by name.
_WALKS = frozenset({"parameters", "named_parameters", "_parameters", "state_dict", "_modules"})

#: The attributes in which every module keeps its tensors, children and hooks.
_MODULE_STATE = frozenset(vars(nn.Module()))


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
        codes += [method.__code__ for method in methods if isinstance(method, FunctionType) and _is_foreign(method)]
        codes += [const for const in code.co_consts if isinstance(const, CodeType)]
    return False


def _is_foreign(function: FunctionType) -> bool:
    # Methods of torch read parameters by name.
    return not (function.__module__ or "").startswith("torch.")


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
