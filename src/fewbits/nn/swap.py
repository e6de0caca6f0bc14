"""Turning float modules into quantized ones and back, in place.

A module becomes quantized by changing its class and its weight, and stays the same object: hooks, shared modules, and
references held outside the module tree go on meaning what they meant.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from types import CodeType
from typing import Any

import torch
from torch import nn

from fewbits.errors import ArgumentError, FewbitsError
from fewbits.nn.base import SUFFIX, QuantizedModule, made_class, stored_weights
from fewbits.nn.modules import CAREFUL_CLASSES, OWN_CLASSES
from fewbits.nn.stored import StoredWeight
from fewbits.nn.walk import deep_copy
from fewbits.numerics.tensor import QuantizedTensor

#: Where a quantized module keeps the names of its parameters in the order they had, to go back to.
_ORDER = "_parameters_in_order"

#: Classes that take all their children for their content; what torch keeps parametrized tensors in does not.
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

#: What a forward that does not read its parameters by name calls.
_WALKS = frozenset({"parameters", "named_parameters", "_parameters"})


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
    if _goes_through_parameters(type(module).forward):
        return f"{type(module).__name__}.forward goes through its parameters, and would miss a quantized one"
    if name + SUFFIX in module._modules:
        return f"it has a child named {name + SUFFIX}, where the quantized weight would go"
    if type(module._parameters.get(name)) is not nn.Parameter:
        return f"it is a {type(module._parameters.get(name)).__name__}, not a plain parameter"
    try:
        quantized_class(type(module), (name,))
    except Exception as error:  # whatever a class does when it is subclassed
        return f"{type(module).__name__} cannot be subclassed ({' '.join(str(error).split())})"
    return None


def _goes_through_parameters(forward: Any) -> bool:
    """Whether a function, or one inside it, names what gives all parameters."""
    codes = [getattr(inspect.unwrap(forward), "__code__", None)]
    while codes:
        code = codes.pop()
        if code is not None:
            if not _WALKS.isdisjoint(code.co_names):
                return True
            codes += [const for const in code.co_consts if isinstance(const, CodeType)]
    return False


def rounds_inputs(module: nn.Module, name: str, parent: nn.Module | None) -> bool:
    """Whether this module, once quantized, would round its inputs to int8 if its weight's spec says so.

    Attention and the encoder layers of torch read the weights of their linear layers themselves.
    """
    if name != "weight" or isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
        return False
    bases = [base.float_class for base in OWN_CLASSES if issubclass(type(module), base.float_class)]
    own = [base for base in bases if base not in (nn.Embedding, nn.EmbeddingBag)]
    return bool(own) and type(module).forward is own[0].forward


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
