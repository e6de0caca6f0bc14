"""Turning float modules into quantized ones and back, in place.

A module becomes quantized by changing its class and its weight, and stays the same object: hooks, shared modules, and
references held outside the module tree go on meaning what they meant.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.errors import ArgumentError, FewbitsError, SourceError
from fewbits.nn import modules as quantized
from fewbits.nn.modules import SUFFIX, QuantizedModule, stored_weights
from fewbits.nn.stored import StoredWeight
from fewbits.nn.walk import deep_copy
from fewbits.numerics.layout import Layout
from fewbits.numerics.tensor import QuantizedTensor

#: The float classes whose weight can be stored, exactly these: a subclass may have a forward of its own.
QUANTIZED_CLASSES: Mapping[type[nn.Module], type[QuantizedModule]] = {
    nn.Linear: quantized.QuantizedLinear,
    nn.modules.linear.NonDynamicallyQuantizableLinear: quantized.QuantizedLinear,
    nn.Conv1d: quantized.QuantizedConv1d,
    nn.Conv2d: quantized.QuantizedConv2d,
    nn.Conv3d: quantized.QuantizedConv3d,
    nn.ConvTranspose1d: quantized.QuantizedConvTranspose1d,
    nn.ConvTranspose2d: quantized.QuantizedConvTranspose2d,
    nn.ConvTranspose3d: quantized.QuantizedConvTranspose3d,
    nn.Embedding: quantized.QuantizedEmbedding,
    nn.EmbeddingBag: quantized.QuantizedEmbeddingBag,
}


def obstacle_to(module: nn.Module, name: str) -> str | None:
    """Why this parameter of this module cannot be stored; None if it can."""
    if isinstance(module, (QuantizedModule, StoredWeight)):
        return "it is quantized already"
    if type(module) not in QUANTIZED_CLASSES:
        base = next((cls.__name__ for cls in type(module).__mro__ if cls in QUANTIZED_CLASSES), None)
        inherits = f", and {type(module).__name__} may use the weight in its own way" if base else ""
        return f"{type(module).__name__} has no quantized form{f' ({base} has' + inherits + ')' if base else ''}"
    if name + SUFFIX in module._modules:
        return f"it has a child named {name + SUFFIX}, where the quantized weight would go"
    if name != "weight" or not isinstance(module._parameters.get("weight"), nn.Parameter):
        return f"{type(module).__name__}.{name} has no quantized form"
    return None


def layout_of(module: nn.Module, weight: Tensor) -> Layout:
    """How the weight of one of `QUANTIZED_CLASSES` is cut: outputs by inputs."""
    shape = tuple(weight.shape)
    if not isinstance(module, nn.modules.conv._ConvNd):
        return Layout.of(shape)
    if not module.transposed:
        return Layout.of(shape, inputs=range(1, len(shape)))
    if module.groups == 1:
        return Layout.of(shape, inputs=(0, *range(2, len(shape))))
    # (groups, inputs of a group, outputs of a group, kernel...): every output of every group is a row.
    view = (module.groups, shape[0] // module.groups, *shape[1:])
    return Layout.of(shape, view=view, inputs=(1, *range(3, len(view))))


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
    obstacle = obstacle_to(module, name)
    if obstacle is not None:
        raise SourceError(f"{type(module).__name__}.{name} cannot be quantized: {obstacle}")
    float_class = type(module)
    parameter = module._parameters.pop(name)
    stored.trainable = parameter is not None and parameter.requires_grad
    stored.training = module.training
    module._modules[name + SUFFIX] = stored
    module.__dict__["float_class"] = float_class
    module.__class__ = QUANTIZED_CLASSES[float_class]


def detach(module: QuantizedModule, weights: Mapping[StoredWeight, nn.Parameter]) -> None:
    """Put parameters back in the place of the stored weights; the module becomes its float class again."""
    names = stored_weights(module)
    object.__setattr__(module, "__class__", module.__dict__.pop("float_class"))
    for name, stored in names.items():
        del module._modules[name + SUFFIX]
        others = dict(module._parameters)
        module._parameters.clear()
        module._parameters.update({name: weights[stored], **others})  # first, as the float class has it


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
