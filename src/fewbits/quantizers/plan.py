"""Plan the ledger: the fate of every tensor, from names, shapes and dtypes alone."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

import attrs

from fewbits.checkpoint.codec import CODEC
from fewbits.checkpoint.metadata import stored_entries
from fewbits.errors import ArgumentError, SelectionError, SourceError
from fewbits.numerics.dtypes import dtype_name
from fewbits.numerics.layout import Layout
from fewbits.numerics.spec import CastSpec, Spec
from fewbits.selection.info import TensorInfo
from fewbits.selection.ledger import UNLESS_ASKED, Ledger
from fewbits.selection.row import Fate, LedgerRow
from fewbits.selection.rules import TypeRule, is_of_type, type_name
from fewbits.selection.selector import Decision

#: Returns the spec for a tensor, and the reason for the ledger.
Choose = Callable[[TensorInfo, Decision], tuple[Spec, str]]


def skip_reason(info: TensorInfo, skip_types: Iterable[TypeRule], scheme: str) -> str | None:
    """Why a scheme would rather keep a tensor; None if it would not."""
    for rule in skip_types:
        if is_of_type(info, rule):
            kind = "an embedding by name," if info.is_embedding_by_name else f"{type_name(rule)} is"
            return f"{kind} kept by {scheme} {UNLESS_ASKED}"
    return None


def plan(infos: Sequence[TensorInfo], decisions: Sequence[Decision], choose: Choose) -> Ledger:
    """Make one row for every tensor, in order; names that share a storage are decided together.

    The first name of a storage is quantized, cast or kept; the others are its aliases. If their decisions differ,
    "keep" wins, unless a user's rule names one. A scale that is read together with its weight gets a "merged" row.

    Args:
        infos: the tensors.
        decisions: one for each of `infos`, in the same order.
        choose: returns the spec and the reason for a storage that is to be quantized.

    Raises:
        SelectionError: if the number of decisions differs from that of the tensors, decisions for one storage
            contradict one another, the input axes of a rule do not fit a shape, or nothing is left to quantize.
        SourceError: if two tensors have the same name.
        FormatError: if two tensors would have the same name in a file.
    """
    if len(decisions) != len(infos):
        raise SelectionError(f"the selector made {len(decisions)} decisions for {len(infos)} tensors")
    if len({info.name for info in infos}) != len(infos):
        raise SourceError("two tensors of the source have the same name")
    groups: dict[Hashable, list[tuple[TensorInfo, Decision]]] = {}
    for info, decision in zip(infos, decisions, strict=True):
        if info.merged_into is None:
            groups.setdefault(info.storage, []).append((info, decision))
    rows = {row.name: row for group in groups.values() for row in _group_rows(group, choose)}
    rows |= {row.name: row for row in _merged_rows(infos)}
    ledger = Ledger(rows[info.name] for info in infos)
    if not any(row.spec is not None for row in ledger):
        raise SelectionError(f"nothing is left to quantize:\n{ledger.summary()}")
    stored_entries(ledger)  # raises if two tensors would have the same name in a file
    return ledger


def _group_rows(group: Sequence[tuple[TensorInfo, Decision]], choose: Choose) -> list[LedgerRow]:
    """The rows of all names of one storage: the first holds it, the others are its aliases."""
    first = group[0][0]
    obstacle = next((info.obstacle for info, _ in group if info.obstacle), None)
    decision = Decision(False, obstacle) if obstacle is not None else _common(group)
    if not decision.quantize:
        head = _row(first, "kept", decision.reason)
    else:
        first = _as_declared(first, decision)
        rounding = [info for info, _ in group if info.rounds_inputs]
        # Scales of inputs and of rows multiply in each output channel, so all layers must agree on the rows.
        alike = bool(rounding) and all(info.layout == first.layout for info in rounding)
        spec, reason = choose(attrs.evolve(first, rounds_inputs=alike), decision)
        spec = spec.for_dtype(first.dtype)
        if isinstance(spec, CastSpec) and spec.dtype == first.dtype:
            head = _row(first, "kept", f"it is {spec} already")
        else:
            head = _row(first, "cast" if isinstance(spec, CastSpec) else "quantized", reason, spec)
    why = f"shares its storage with {first.name}"
    return [head, *(_row(info, "alias", why, alias_of=first.name) for info, _ in group[1:])]


def _common(group: Sequence[tuple[TensorInfo, Decision]]) -> Decision:
    """One decision for all names: "keep" wins, unless a user's rule says "quantize"."""
    named = [decision for _, decision in group if decision.named]
    overrides = {decision.override for decision in named} - {None}
    axes = {decision.input_axes for _, decision in group} - {None}
    if len({decision.quantize for decision in named}) > 1 or len(overrides) > 1 or len(axes) > 1:
        names = ", ".join(f"{info.name} ({decision.reason})" for info, decision in group if decision.named or axes)
        raise SelectionError(f"one storage, two fates: {names}; tied tensors are quantized together or kept together")
    decisions = named or [decision for _, decision in group]
    # A rule with an override speaks for all names.
    chosen = min(decisions, key=lambda decision: (decision.quantize, decision.override is None))
    return attrs.evolve(chosen, input_axes=next(iter(axes), None))


def _as_declared(info: TensorInfo, decision: Decision) -> TensorInfo:
    """The tensor with the layout that a rule declares."""
    if decision.input_axes is None:
        return info
    try:
        return attrs.evolve(info, layout=Layout.of(info.shape, inputs=decision.input_axes), declared=True)
    except ArgumentError as error:
        raise SelectionError(f"input_axes: {info.name}, shape {info.shape}: {error}") from None


def _row(
    info: TensorInfo, fate: Fate, reason: str, spec: Spec | None = None, *, alias_of: str | None = None
) -> LedgerRow:
    if info.dequantized_from is not None and alias_of is None:
        reason = f"{reason}; dequantized from {dtype_name(info.dequantized_from)}"
    row = LedgerRow(
        name=info.name,
        shape=info.shape,
        dtype=info.dtype,
        fate=fate,
        reason=reason,
        bytes_before=info.nbytes if alias_of is None else 0,
        bytes_after=0,
        spec=spec,
        layout=info.layout if fate == "quantized" else None,
        persistent=info.persistent,
        dequantized_from=info.dequantized_from,
        merged_into=info.merged_into,
        alias_of=alias_of,
    )
    return CODEC.sized(row)


def _merged_rows(infos: Sequence[TensorInfo]) -> Iterator[LedgerRow]:
    """Rows of scales that are read together with their weights; a shared storage is counted once."""
    counted: set[Hashable] = set()
    for info in infos:
        if info.merged_into is not None:
            row = _row(info, "merged", f"scale of {info.merged_into}, which is dequantized with it")
            yield attrs.evolve(row, bytes_before=0) if info.storage in counted else row
            counted.add(info.storage)
