"""A checkpoint under the names that a model of transformers has, with the tensors that transformers merges or splits.

Codes stay as they are. Transformers' converters move whole rows of weights: they stack experts, concatenate or split
projections, or permute rows. Each converter is run once on numbered rows, which shows where every row goes; packed
codes, scales and zero points follow. If a converter does anything else, the weight is dequantized.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from fewbits._events import emit
from fewbits.checkpoint.codec import CODEC, Value
from fewbits.checkpoint.reading import Checkpoint
from fewbits.errors import MismatchError
from fewbits.formats.base import ForeignCheckpoint
from fewbits.formats.row_moves import RowMoves, collapsed, common_spec, is_movable, numbered, row_numbers
from fewbits.formats.transformers_names import Conversion, NamePlan, StandIn, meta_like, plan_names, transforms_of
from fewbits.nn.eligibility import layout_of
from fewbits.nn.walk import Slot, slots
from fewbits.numerics.layout import Layout
from fewbits.numerics.spec import CastSpec, QuantSpec, Spec
from fewbits.numerics.tensor import QuantizedTensor, same_bits
from fewbits.selection.ledger import Ledger
from fewbits.selection.row import Fate, LedgerRow

#: Reads a stored tensor of the checkpoint, by its name there.
ReadStored = Callable[[str], Value]


@attrs.frozen(eq=False)
class Made:
    """A tensor of the model that is made of tensors of the checkpoint.

    Attributes:
        conversion: how transformers makes it.
        row: its row of the ledger.
        moves: where its rows come from; None if it is made of floats.
    """

    conversion: Conversion
    row: LedgerRow
    moves: RowMoves | None = None


class Renaming:
    """The tensors of a checkpoint, as a model of transformers has them.

    Args:
        model: the model; its weights are floats.
        ledger: the ledger of the checkpoint.
        transforms: transformers' renamings and converters for the model.

    Attributes:
        plan: where each tensor of the checkpoint goes.
        ledger: every tensor, by its name in the model.
        origin: the name of the stored row in the checkpoint, for each tensor that is only renamed.
        made: the other tensors.

    Raises:
        MismatchError: if transformers cannot convert tensors of these shapes.
    """

    def __init__(self, model: Any, ledger: Ledger, transforms: Sequence[Any]) -> None:
        self._source = ledger
        self._slots = {slot.name: slot for slot in slots(model)}
        shapes = {name: meta_like(slot.tensor.shape, slot.tensor.dtype) for name, slot in self._slots.items()}
        self._stand_in = StandIn(model.config, shapes)
        self._numbered = StandIn(model.config, {name: _numbered_shape(slot) for name, slot in self._slots.items()})
        self.plan: NamePlan = plan_names(model, (row.name for row in ledger.present), transforms)
        self.made = {made.row.name: made for conversion in self.plan.conversions for made in self._make(conversion)}
        self.origin: dict[str, str] = {}
        self.ledger = Ledger([*self._renamed_rows(), *(made.row for made in self.made.values())])
        if decoded := [made.row.name for made in self.made.values() if self._is_decoded(made)]:
            reason = "transformers merges weights of different schemes, or changes the order of their columns"
            emit("warning", "dequantized_to_load", tensors=decoded, reason=reason)

    def value(self, name: str, read: ReadStored) -> Value:
        """Return the stored form of a tensor.

        Args:
            name: the name of a tensor in the model.
            read: reads a tensor of the checkpoint.
        """
        name = self.ledger[name].holder
        if name in self.origin:
            return read(self.origin[name])
        made = self.made[name]
        values = {source: read(self._source[source].holder) for source in made.conversion.names}
        if made.moves is not None:
            return made.moves.apply([value for value in values.values() if isinstance(value, QuantizedTensor)])
        plain = {source: self._as_plain(value, source, made.row.spec) for source, value in values.items()}
        return made.conversion.run(plain, self._stand_in)[name]

    def _as_plain(self, value: Value, source: str, spec: Spec | None) -> Tensor:
        if isinstance(value, QuantizedTensor):
            return value.dequantize()
        return value if spec is not None else value.to(self._source[source].dtype)

    def _is_decoded(self, made: Made) -> bool:
        specs = [self._source[self._source[name].holder].spec for name in made.conversion.names]
        return made.moves is None and any(isinstance(spec, QuantSpec) for spec in specs)

    def _renamed_rows(self) -> list[LedgerRow]:
        rows: dict[str, LedgerRow] = {}
        holders: dict[str, str] = {}
        for row in sorted(self._source.present, key=lambda row: row.alias_of is not None):
            if row.name not in self.plan.renamed:
                continue
            name = self.plan.renamed[row.name]
            name = row.name if name in rows or name in self.made else name
            if row.holder in holders:
                rows[name] = attrs.evolve(row, name=name, alias_of=holders[row.holder])
            else:  # the row itself, or an alias of a tensor that is converted
                rows[name] = attrs.evolve(self._source[row.holder], name=name)
                holders[row.holder], self.origin[name] = name, row.holder
        return list(rows.values())

    def _make(self, conversion: Conversion) -> list[Made]:
        """List the tensors that a conversion makes."""
        rows = [self._source[self._source[name].holder] for name in conversion.names]
        shapes = {name: meta_like(row.shape, row.dtype) for name, row in zip(conversion.names, rows, strict=True)}
        spec = common_spec(rows)
        moved = self._moved(conversion, rows) if isinstance(spec, QuantSpec) else {}
        made = []
        for name, tensor in conversion.run(shapes, self._stand_in).items():
            found = self._moves(name, tuple(tensor.shape), moved.get(name), rows)
            moves = RowMoves(spec, *found) if isinstance(spec, QuantSpec) and found is not None else None
            own = spec if moves is not None or isinstance(spec, CastSpec) else None
            made.append(Made(conversion, _row(name, tensor, own, None if moves is None else moves.layout), moves))
        return made

    def _moved(self, conversion: Conversion, rows: Sequence[LedgerRow]) -> Mapping[str, Tensor]:
        """Convert numbered rows; empty if that is not possible."""
        tensors: dict[str, Tensor] = {}
        start = 0
        for name, row in zip(conversion.names, rows, strict=True):
            if row.layout is None or not is_movable(row.layout):
                return {}
            tensors[name] = numbered(row.layout, start)
            start += row.layout.rows
        try:
            return conversion.run(tensors, self._numbered)
        except MismatchError:  # the converter does not move whole rows
            return {}

    def _moves(
        self, name: str, shape: tuple[int, ...], moved: Tensor | None, rows: Sequence[LedgerRow]
    ) -> tuple[Layout, Tensor] | None:
        """Find the layout of a tensor and the numbers of its rows."""
        columns = {row.layout.columns for row in rows if row.layout is not None}
        for layout in self._layouts(name, shape, rows[0].layout):
            if moved is not None and columns == {layout.columns}:
                index = row_numbers(moved, layout)
                if index is not None:
                    return layout, index
        return None

    def _layouts(self, name: str, shape: tuple[int, ...], source: Layout | None) -> list[Layout]:
        """List the layouts that a tensor may have: that of its module, and that of its first source."""
        slot = self._slots.get(name)
        layouts = [] if slot is None else [layout_of(slot.module, slot.local, slot.tensor)[0]]
        if source is not None and len(source.shape) == len(shape):
            layouts.append(Layout.of(shape, inputs=source.permutation[source.row_axes :]))
        return [layout for layout in layouts if layout.shape == shape and is_movable(layout)]


class RenamedCheckpoint:
    """A checkpoint, read under the names of a model.

    Attributes:
        path: the path of the checkpoint.
        ledger: every tensor, by its name in the model.
        of_linear: names of weights that have one row per output, whatever the model has; see `ForeignCheckpoint`.
    """

    def __init__(self, source: Checkpoint | ForeignCheckpoint, renaming: Renaming) -> None:
        self.path, self.ledger = source.path, renaming.ledger
        self._source, self._renaming = source, renaming
        of_linear = source.of_linear if isinstance(source, ForeignCheckpoint) else ()
        self.of_linear = frozenset(name for name, origin in renaming.origin.items() if origin in of_linear)

    def value(self, name: str) -> Value:
        """Return the stored form of a tensor; it aliases the mapped file if transformers only renames it."""
        return self._renaming.value(name, self._source.value)

    def read(self, name: str) -> Value:
        """Return the stored form of a tensor in memory of its own."""
        return self._renaming.value(name, self._source.read)

    def same(self, first: str, second: str) -> bool:
        """Tell whether two tensors are equal bit for bit."""
        return same_bits(self.value(first), self.value(second))


def named_as_in(
    model: nn.Module, checkpoint: Checkpoint | ForeignCheckpoint
) -> Checkpoint | ForeignCheckpoint | RenamedCheckpoint:
    """Return a checkpoint under the names of a model, as transformers would load it.

    Args:
        model: a float model.
        checkpoint: a checkpoint with the names of the model's modules, or made from files of transformers.

    Raises:
        MismatchError: if transformers cannot convert tensors of these shapes.
    """
    transforms = None if has_names_of(model, checkpoint.ledger) else transforms_of(model)
    if transforms is None:
        return checkpoint
    return RenamedCheckpoint(checkpoint, Renaming(model, checkpoint.ledger, transforms))


def has_names_of(model: nn.Module, ledger: Ledger) -> bool:
    """Tell whether a model has every tensor of a checkpoint, under its name and in its shape."""
    shapes = {slot.name: tuple(slot.tensor.shape) for slot in slots(model) if not nn.parameter.is_lazy(slot.tensor)}
    return all(shapes.get(row.name) == row.shape for row in ledger.present)


def _row(name: str, tensor: Tensor, spec: Spec | None, layout: Layout | None) -> LedgerRow:
    fates: dict[type, Fate] = {QuantSpec: "quantized", CastSpec: "cast"}
    row = LedgerRow(
        name=name,
        shape=tuple(tensor.shape),
        dtype=tensor.dtype,
        fate=fates.get(type(spec), "kept"),
        reason="made of other tensors while loading",
        bytes_before=math.prod(tensor.shape) * tensor.dtype.itemsize,
        bytes_after=0,
        spec=spec,
        layout=layout,
    )
    return CODEC.sized(row)


def _numbered_shape(slot: Slot) -> Tensor:
    """Return a tensor with the shape that a parameter has if its rows are numbered."""
    shape = tuple(slot.tensor.shape)
    layout = layout_of(slot.module, slot.local, slot.tensor)[0] if slot.is_parameter and len(shape) > 1 else None
    return meta_like(shape if layout is None or not is_movable(layout) else collapsed(layout).shape, torch.int64)
