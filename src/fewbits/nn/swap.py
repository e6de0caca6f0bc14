"""Turn float modules into quantized ones and back, in place.

A module changes its class and its weight, and stays the same object. Hooks, shared modules, and references from outside
the module tree stay valid.

`save_pretrained` of a model with quantized layers is refused. Transformers and sentence-transformers write the tensors
of a model's state dict. On reading they find no ``weight``, and fill it with random numbers; only their log says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import nn

from fewbits.errors import ArgumentError, CheckpointError, SourceError
from fewbits.nn.base import QuantizedModule, made_class, quantized_form
from fewbits.nn.stored import SUFFIX, StoredWeight, reads, stored_weights
from fewbits.nn.walk import Slot, deep_copy, forget_tuning
from fewbits.numerics.tensor import QuantizedTensor

#: The attribute of a quantized module with the names of its float parameters, in order.
_ORDER = "_parameters_in_order"

#: The methods that would write the weights of a model.
_SAVING_METHODS = ("save_pretrained", "save")


def attach(module: nn.Module, name: str, stored: StoredWeight) -> None:
    """Replace a parameter with a stored weight; the module takes its quantized class.

    Raises:
        SourceError: If the module would not read the stored weight; the module stays unchanged.
    """
    float_class = module.float_class if isinstance(module, QuantizedModule) else type(module)
    module.__dict__.setdefault(_ORDER, tuple(module._parameters))
    parameter = module._parameters.pop(name)
    stored.trainable = parameter is not None and parameter.requires_grad
    stored.training = module.training
    module._modules[name + SUFFIX] = stored
    form = quantized_form(float_class, stored_weights(module))
    object.__setattr__(module, "__class__", made_class(float_class, *form))
    if isinstance(module, QuantizedModule):
        module.stores()
    if not reads(module, name, stored):
        _put_back(module, {name: parameter})
        raise SourceError(
            f"{float_class.__name__} computes its attribute {name} itself, and would miss a quantized weight; "
            "exclude it"
        )


@contextlib.contextmanager
def attached(places: Sequence[Slot], stored: StoredWeight) -> Iterator[None]:
    """Replace parameters with a stored weight in a ``with`` block; afterwards the modules are as before.

    Raises:
        SourceError: If a module would not read the stored weight.
    """
    with contextlib.ExitStack() as undo:
        for slot in places:
            parameter = slot.module._parameters[slot.local]
            attach(slot.module, slot.local, stored)
            undo.callback(_put_back, slot.module, {slot.local: parameter})
        yield


def _put_back(module: nn.Module, parameters: Mapping[str, nn.Parameter | None]) -> None:
    """Restore parameters, in the old order; a module without stored weights takes its float class again."""
    for name in parameters:
        del module._modules[name + SUFFIX]
    held = module._parameters | dict(parameters)
    order = [name for name in dict.fromkeys([*module.__dict__[_ORDER], *held]) if name in held]
    module._parameters.clear()
    module._parameters.update((name, held[name]) for name in order)
    if isinstance(module, QuantizedModule) and not stored_weights(module):
        cls = type(module)
        del module.__dict__[_ORDER]
        object.__setattr__(module, "__class__", cls.float_class)
        cls.restored(module)


def dequantize(model: Any, *, dtype: torch.dtype | None = None) -> Any:
    """Return a float copy of a quantized model or mapping.

    Args:
        model: A model, or a mapping {name: Tensor or QuantizedTensor}; it is not changed.
        dtype: The dtype of dequantized weights; None: the dtype of each float weight before.

    Returns:
        A model of the same classes as before, tied weights tied; or a mapping {name: Tensor}.

    Raises:
        ArgumentError: If `model` is neither a model nor a mapping.
        SourceError: If a part of the model cannot be copied.
    """
    if isinstance(model, Mapping):
        return {name: v.dequantize(dtype) if isinstance(v, QuantizedTensor) else v for name, v in model.items()}
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"dequantize takes a model or a mapping of tensors, not a {type(model).__name__}")
    # The memo keeps stored weights from being copied.
    stored = {module: None for module in model.modules() if isinstance(module, StoredWeight)}
    plain = deep_copy(model, {id(module): module for module in stored}, otherwise="load its file and dequantize that")
    dequantize_in_place(plain, dtype)
    return plain


def dequantize_in_place(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Turn the quantized modules of a model into float modules.

    Args:
        model: A quantized model.
        dtype: The dtype of dequantized weights; None: the dtype of each float weight before.
    """
    floats: dict[StoredWeight, nn.Parameter] = {}
    for module in [m for m in model.modules() if isinstance(m, QuantizedModule)]:
        weights = stored_weights(module)
        for stored in weights.values():
            if stored not in floats:
                floats[stored] = nn.Parameter(stored.dequantize(dtype), requires_grad=stored.trainable)
        _put_back(module, {name: floats[stored] for name, stored in weights.items()})
    forget_tuning(model)
    for held in map(vars, model.modules()):
        for name in _SAVING_METHODS:
            if held.get(name) is _refuse:
                del held[name]


def become_float(module: nn.Module) -> dict[str, StoredWeight]:
    """Turn one quantized module itself, not its children, into a float module.

    Other modules that share a stored weight keep it.

    Returns:
        The stored weights that the module had, by parameter name; `attach` puts them back.
    """
    stored = stored_weights(module)
    weights = {name: nn.Parameter(s.dequantize(), requires_grad=s.trainable) for name, s in stored.items()}
    if weights:
        _put_back(module, weights)
    return stored


def refuse_save_pretrained(model: nn.Module) -> None:
    """Make `save_pretrained` raise an error, for a model and for every module in it that contains a quantized one.

    Modules that no longer contain a quantized one get their own methods back.
    """
    for module in model.modules():
        for name in _SAVING_METHODS:
            if vars(module).get(name) is _refuse:
                del module.__dict__[name]
        # A peft model writes its adapters alone, which are not quantized.
        writes_weights = callable(getattr(module, "save_pretrained", None)) and not hasattr(module, "peft_config")
        if writes_weights and any(isinstance(inner, QuantizedModule) for inner in module.modules()):
            methods = [name for name in _SAVING_METHODS if callable(getattr(module, name, None))]
            module.__dict__.update(dict.fromkeys(methods, _refuse))


def _refuse(*_: Any, **__: Any) -> NoReturn:
    """Replaces `save_pretrained` and `save`.

    Raises:
        CheckpointError: Always.
    """
    raise CheckpointError(
        "this model holds quantized layers, which from_pretrained would fill with random numbers. Save it with the "
        "quantizer or the result that made it, .save(path), and load it with fewbits.load(path, into=model); or save "
        "a float model, fewbits.dequantize(model).save_pretrained(path)"
    )
