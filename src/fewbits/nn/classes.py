"""Look up the declarations of the quantized form of a float module."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn

import fewbits.nn.modules  # noqa: F401, registers the quantized forms of this library
from fewbits.nn.base import QuantizedModule, made_class, quantized_form
from fewbits.numerics.layout import Layout
from fewbits.selection.info import layout_by_shape


def quantized_class(float_class: type[nn.Module], names: Collection[str]) -> type[QuantizedModule]:
    """Return the quantized class for modules of `float_class` that store these parameters.

    Raises:
        TypeError: if the class cannot be subclassed.
    """
    return made_class(float_class, *quantized_form(float_class, names))


def rounds_inputs(module: nn.Module, name: str, parent: nn.Module | None) -> bool:
    """Whether a module, once this parameter is quantized, rounds its inputs to int8 if the parameter's spec says so."""
    form, replaced = quantized_form(type(module), [name])
    if not form.rounds_inputs or name != form.own_weight or "forward" in vars(module):
        return False
    if parent is not None and quantized_form(type(parent), [])[0].reads_weights_of_children:
        return False
    return all(getattr(type(module), part) is getattr(replaced, part) for part in form.forward_methods)


def layout_of(module: nn.Module, name: str, weight: Tensor) -> tuple[Layout, bool]:
    """Say how a parameter is cut into outputs and inputs.

    Returns:
        the layout, and whether the class declares it; otherwise it follows from the shape.
    """
    shape = tuple(weight.shape)
    declared = quantized_form(type(module), [name])[0].declared_layout(module, name, shape)
    return (layout_by_shape(shape), len(shape) == 2) if declared is None else (declared, True)
