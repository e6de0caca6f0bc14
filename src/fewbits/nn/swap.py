"""Turning float modules into quantized ones and back, in place.

A module becomes quantized by changing its class and its weight, and stays the same object: hooks, shared modules, and
references held outside the module tree go on meaning what they meant.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fewbits.errors import ArgumentError, FewbitsError, SourceError
from fewbits.nn.base import SUFFIX, QuantizedModule, stored_weights
from fewbits.nn.classes import quantized_class
from fewbits.nn.copying import deep_copy
from fewbits.nn.reading import reads
from fewbits.nn.saving import allow_save_pretrained
from fewbits.nn.stored import StoredWeight
from fewbits.nn.walk import Slot
from fewbits.numerics.tensor import QuantizedTensor

#: Where a quantized module keeps the names of its parameters in the order they had, to go back to.
_ORDER = "_parameters_in_order"


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
    """Put a stored weight in the place of a parameter; the module becomes its quantized class.

    Raises:
        SourceError: if the module would not read it. It is as it was then.
    """
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
        _put_back(module, {name: parameter})
        raise SourceError(
            f"{float_class.__name__} reads its attribute {name} in a way of its own, which would miss a quantized "
            "weight; exclude it"
        )


@contextlib.contextmanager
def attached(places: Sequence[Slot], stored: StoredWeight) -> Iterator[None]:
    """Put a stored weight in the place of parameters for a while. Afterwards the modules are as they were.

    Raises:
        SourceError: if a module would not read it.
    """
    before: dict[nn.Module, dict[str, nn.Parameter | None]] = {}
    try:
        for slot in places:
            parameter = slot.module._parameters[slot.local]
            attach(slot.module, slot.local, stored)
            before.setdefault(slot.module, {})[slot.local] = parameter
        yield
    finally:
        for module, parameters in before.items():
            _put_back(module, parameters)


def detach(module: QuantizedModule, weights: Mapping[StoredWeight, nn.Parameter]) -> None:
    """Put parameters back in the place of the stored weights; the module becomes its float class again."""
    _put_back(module, {name: weights[stored] for name, stored in stored_weights(module).items()})


def _put_back(module: nn.Module, parameters: Mapping[str, nn.Parameter | None]) -> None:
    """Put parameters in the place of their stored weights, in the old order; without any left, the class goes back."""
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
    plain = deep_copy(model, {id(module): module for module in stored}, otherwise="load its file and dequantize that")
    weights = {s: nn.Parameter(s.dequantize(dtype), requires_grad=s.trainable) for s in stored}
    for module in [m for m in plain.modules() if isinstance(m, QuantizedModule)]:
        detach(module, weights)
    allow_save_pretrained(plain)
    return plain
