"""Fitting a spec to one tensor: rows that groups do not divide, inputs that cannot be rounded."""

from __future__ import annotations

from typing import Literal, get_args

from fewbits.errors import ArgumentError, SelectionError
from fewbits.numerics.spec import QuantSpec, Spec
from fewbits.selection.info import TensorInfo
from fewbits.selection.ledger import Ledger

Ragged = Literal["auto", "shorter", "fallback", "error"]


def resolve_spec(spec: QuantSpec, info: TensorInfo, ragged: Ragged, reason: str) -> tuple[Spec, str]:
    """The spec as it can be used for this tensor, and the reason for the ledger."""
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
    """Under "error", refuse rows that groups do not divide.

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


def check_ragged(ragged: Ragged) -> Ragged:
    """A policy for ragged rows, if it is one.

    Raises:
        ArgumentError: listing the policies.
    """
    if ragged not in get_args(Ragged):
        raise ArgumentError(f"ragged must be one of {', '.join(map(repr, get_args(Ragged)))}, not {ragged!r}")
    return ragged
