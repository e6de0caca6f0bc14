"""Resolve the arguments of a `Quantizer`: its strategies, and the spec for one tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from fewbits.errors import ArgumentError, SelectionError
from fewbits.numerics.spec import QuantSpec, Spec
from fewbits.observers import OBSERVERS
from fewbits.observers.base import Observer
from fewbits.observers.named import make_observer
from fewbits.selection.info import TensorInfo
from fewbits.selection.ledger import Ledger

Ragged = Literal["auto", "shorter", "fallback", "error"]


def resolve_strategy(name: str, value: Any, expected: type, default: Callable[[], Any]) -> Any:
    """Check that a strategy is an instance of its base class, and not the class itself. None gives the default.

    An observer may be given by its name, or as a mapping with its name and arguments.

    Raises:
        ArgumentError: if it is something else.
    """
    if value is None:
        return default()
    if expected is Observer and isinstance(value, (str, Mapping)):
        return make_observer(name, value)
    if not isinstance(value, expected):
        known = f", or the name of one: {', '.join(map(repr, OBSERVERS))};" if expected is Observer else ","
        raise ArgumentError(f"{name} must be an instance of {expected.__name__}{known} not {value!r}")
    return value


def resolve_spec(spec: QuantSpec, info: TensorInfo, ragged: Ragged, reason: str) -> tuple[Spec, str]:
    """The spec that fits this tensor, and the reason for the ledger."""
    if not info.rounds_inputs:
        spec = spec.weight_only()
    if not info.declared:
        reason += "; cut by its shape, which input_axes can correct"
    if spec.group_size is None or info.layout is None:
        return spec, reason
    columns, size = info.layout.columns, spec.group_size
    if ragged == "auto" and columns < size:
        reason = f"rows of {columns} are shorter than one group of {size}"
    elif ragged == "fallback" and columns % size:
        reason = f"groups of {size} do not divide rows of {columns}"
    else:
        return spec, reason
    return QuantSpec(bits=8, granularity="channel", scale_dtype=spec.scale_dtype), reason


def refuse_ragged(ledger: Ledger, ragged: Ragged) -> None:
    """Refuse rows that groups do not divide, if `ragged` is "error".

    Raises:
        SelectionError: naming every such tensor with its shape.
    """
    if ragged != "error":
        return
    found = [
        f"{row.name}, shape {row.shape}, rows of {row.layout.columns} in groups of {row.spec.group_size}"
        for row in ledger
        if isinstance(row.spec, QuantSpec) and row.layout is not None and row.spec.group_size is not None
        and row.layout.columns % row.spec.group_size
    ]  # fmt: skip
    if found:
        raise SelectionError(
            f"groups do not divide the rows of {len(found)} tensors: {'; '.join(found)}. Override their group_size, "
            "exclude them, or choose ragged='auto', 'shorter' or 'fallback'"
        )


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Refuse a value that is not one of the choices. Types must match too: 1 is not True.

    Raises:
        ArgumentError: listing the choices.
    """
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        *others, last = map(repr, choices)
        raise ArgumentError(f"{name} must be {', '.join(others)} or {last}, not {value!r}")
