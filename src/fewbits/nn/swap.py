"""Turning float modules into quantized ones and back, in place.

A module becomes quantized by changing its class and its weight, and stays the same object: hooks, shared modules, and
references held outside the module tree go on meaning what they meant.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

from fewbits.errors import ArgumentError, FewbitsError, SourceError
from fewbits.nn.base import SUFFIX, QuantizedModule, made_class, reads, stored_weights
from fewbits.nn.modules import CAREFUL_CLASSES, OWN_CLASSES
from fewbits.nn.stored import StoredWeight
from fewbits.nn.walk import deep_copy
from fewbits.numerics.tensor import QuantizedTensor

#: Where a quantized module keeps the names of its parameters in the order they had, to go back to.
_ORDER = "_parameters_in_order"

#: Classes that take all their children for their content; what torch keeps parametrized tensors in does not.
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

#: What a forward that does not read its parameters by name calls.
_WALKS = frozenset({"parameters", "named_parameters", "_parameters", "state_dict", "_modules"})


def quantized_class(float_class: type[nn.Module], names: Collection[str]) -> type[QuantizedModule]:
    """The class of modules of `float_class` whose parameters of these names are stored.

    Raises:
        TypeError: if there cannot be one.
    """
    candidates = (*(OWN_CLASSES if "weight" in names else ()), *CAREFUL_CLASSES)
    base = next((base for base in candidates if issubclass(float_class, base.float_class)), QuantizedModule)
    return made_class(float_class, base)


def obstacle_to(module: nn.Module, name: str) -> str | None:
    """Why this parameter of this module cannot be stored; None if it can."""
    if isinstance(module, (QuantizedModule, StoredWeight)):
        return "it is quantized already"
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript modules cannot be changed; quantize the module it was made from"
    if isinstance(module, _CONTAINERS) and type(module).__name__ != "ParametrizationList":
        return f"{type(module).__name__} is a container, and would take the stored weight for part of its content"
    if _goes_through_parameters(type(module)):
        return f"{type(module).__name__}.forward goes through its parameters, and would miss a quantized one"
    if hasattr(module, name + SUFFIX):
        return f"it has an attribute {name + SUFFIX}, where the quantized weight would go"
    if type(module._parameters.get(name)) is not nn.Parameter:
        return f"it is a {type(module._parameters.get(name)).__name__}, not a plain parameter"
    try:
        quantized_class(type(module), (name,))
    except Exception as error:  # whatever a class does when it is subclassed
        return f"{type(module).__name__} cannot be subclassed ({' '.join(str(error).split())})"
    return None


def _goes_through_parameters(cls: type[nn.Module]) -> bool:
    """Whether the forward of a class, or a method of its own that it calls, names what gives all parameters."""
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
    return not function.__module__.startswith("torch.")


def rounds_inputs(module: nn.Module, name: str, parent: nn.Module | None) -> bool:
    """Whether this module, once quantized, would round its inputs to int8 if its weight's spec says so.

    Attention and the encoder layers of torch read the weights of their linear layers themselves.
    """
    if name != "weight" or isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
        return False
    bases = [base.float_class for base in OWN_CLASSES if issubclass(type(module), base.float_class)]
    own = [base for base in bases if base not in (nn.Embedding, nn.EmbeddingBag)]
    parts = ("forward", "_conv_forward", "_output_padding")
    return (
        bool(own)
        and "forward" not in vars(module)
        and all(getattr(type(module), part, None) is getattr(own[0], part, None) for part in parts)
    )


def refuse_quantized(model: nn.Module, error: type[FewbitsError]) -> None:
    """Raise this error if any module of the model is quantized."""
    names = [name for name, module in model.named_modules() if isinstance(module, QuantizedModule)]
    if names:
        more = f" and {len(names) - 1} more modules are" if names[1:] else " is"
        raise error(
            f"{names[0] or 'the root module'}{more} quantized already; take a float model, "
            "such as fewbits.dequantize(model) gives"
        )


def attach(module: nn.Module, name: str, stored: StoredWeight) -> None:
    """Put a stored weight in the place of a parameter; the module becomes its quantized class."""
    float_class = module.float_class if isinstance(module, QuantizedModule) else type(module)
    module.__dict__.setdefault(_ORDER, tuple(module._parameters))
    parameter = module._parameters.pop(name)
    stored.trainable = parameter is not None and parameter.requires_grad
    stored.training = module.training
    module._modules[name + SUFFIX] = stored
    object.__setattr__(module, "__class__", quantized_class(float_class, stored_weights(module)))
    if isinstance(module, QuantizedModule):
        module.stores()
    if not reads(module, name, stored):
        module._parameters[name] = parameter
        del module._modules[name + SUFFIX]
        if not stored_weights(module):
            object.__setattr__(module, "__class__", float_class)
        raise SourceError(
            f"{float_class.__name__} reads its attribute {name} in a way of its own, which would miss a quantized "
            "weight; exclude it"
        )


def detach(module: QuantizedModule, weights: Mapping[StoredWeight, nn.Parameter]) -> None:
    """Put parameters back in the place of the stored weights; the module becomes its float class again."""
    names, cls = stored_weights(module), type(module)
    object.__setattr__(module, "__class__", cls.float_class)
    parameters = dict(module._parameters)
    for name, stored in names.items():
        del module._modules[name + SUFFIX]
        parameters[name] = weights[stored]
    order = [*module.__dict__.pop(_ORDER), *parameters]
    module._parameters.clear()
    module._parameters.update((name, parameters[name]) for name in dict.fromkeys(order) if name in parameters)
    cls.restored(module)


def dequantize(model: Any, *, dtype: torch.dtype | None = None) -> Any:
    """A plain float copy of what `quantize` or `load` gave.

    Args:
        model: a model, or a mapping {name: Tensor or QuantizedTensor}; it is not changed.
        dtype: of the weights that were quantized; None stands for the dtype each would have.

    Returns:
        a model of the same classes as before, tied weights tied; or a mapping {name: Tensor}.

    Raises:
        ArgumentError: if it is neither.
        SourceError: if something in the model refuses to be copied.
    """
    if isinstance(model, Mapping):
        return {name: v.dequantize(dtype) if isinstance(v, QuantizedTensor) else v for name, v in model.items()}
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"dequantize takes a model or a mapping of tensors, not a {type(model).__name__}")
    # Stored weights are not copied, only read.
    stored = {module: None for module in model.modules() if isinstance(module, StoredWeight)}
    plain = deep_copy(model, {id(module): module for module in stored})
    weights = {s: nn.Parameter(s.dequantize(dtype), requires_grad=s.trainable) for s in stored}
    for module in [m for m in plain.modules() if isinstance(m, QuantizedModule)]:
        detach(module, weights)
    return plain
