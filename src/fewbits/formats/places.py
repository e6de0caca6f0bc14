"""Find the places in a model for the tensors of a checkpoint, and everything that does not match."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn

from fewbits.checkpoint.filling import InitBuffers, initial_values, ties
from fewbits.checkpoint.reading import Checkpoint
from fewbits.errors import MismatchError
from fewbits.formats.base import ForeignCheckpoint
from fewbits.formats.renamed import RenamedCheckpoint
from fewbits.nn.eligibility import compiled_hint, layout_of, obstacle_to, rounds_inputs
from fewbits.nn.walk import Slot, parent_of, slots
from fewbits.numerics.dtypes import dtype_name
from fewbits.numerics.layout import Layout
from fewbits.selection.patterns import Pattern, check_all_used
from fewbits.selection.row import LedgerRow

_Checkpoint = Checkpoint | ForeignCheckpoint | RenamedCheckpoint

#: The slots of each stored row, by its name.
Places = dict[str, list[Slot]]


def find_places(
    checkpoint: _Checkpoint,
    model: nn.Module,
    beside: Mapping[str, str],
    ignored: Sequence[Pattern],
    init_buffers: InitBuffers | None,
) -> tuple[Places, list[tuple[Slot, Tensor]]]:
    """Find the slots of each stored row, and values for buffers that the file lacks.

    Args:
        checkpoint: the file, with the names of the model.
        model: the model.
        beside: the weights that something else in the model holds too, with the reason why that forbids codes.
        ignored: patterns of tensors that may stay in the file.
        init_buffers: sets buffers that neither the file nor the model has.

    Raises:
        SelectionError: if a pattern matches no tensor that may stay in the file.
        MismatchError: if file and model do not match; the message names every tensor.
    """
    finder = _Finder(checkpoint, model, beside)
    finder.find(ignored)
    problems = finder.problems
    problems += [
        problem for row in checkpoint.ledger for problem in unrounded(row, finder.places.get(row.name, ()), model)
    ]
    values, without = initial_values(model, finder.bare, init_buffers)
    problems += without
    if problems:
        raise MismatchError(f"{checkpoint.path} does not fit {type(model).__name__}: {'; '.join(problems)}")
    return finder.places, [(slot, values[slot.key]) for slot in finder.bare]


class _Finder:
    """Matches the rows of a checkpoint with the slots of a model, and collects problems.

    A row goes to the slots of its own name, of its aliases, and of names that the model ties to them.

    Attributes:
        places: the slots of each stored row.
        bare: the slots of non-persistent buffers without memory, which the file lacks.
        problems: everything that does not match.
    """

    def __init__(self, checkpoint: _Checkpoint, model: nn.Module, beside: Mapping[str, str]) -> None:
        self._checkpoint, self._model, self._beside = checkpoint, model, beside
        self._rows = {row.name: row for row in checkpoint.ledger.present}
        self._slots = {slot.name: slot for slot in slots(model)}
        self._taken: dict[str, LedgerRow] = {}
        self._takers: dict[tuple[int, str], str] = {}
        self._absent: list[str] = []
        self.places: Places = {row.name: [] for row in checkpoint.ledger.stored}
        self.bare: list[Slot] = []
        self.problems: list[str] = []

    def find(self, ignored: Sequence[Pattern]) -> None:
        """Fill the attributes; `ignored` are patterns of tensors that may stay in the file."""
        self._leave(ignored)
        self._place()
        self._check_absent()

    def _leave(self, ignored: Sequence[Pattern]) -> None:
        """Decide which tensors stay in the file; a tensor that the model lacks is a problem unless it is ignored."""
        rows, known = self._rows, self._slots
        needless = [name for name in rows if name not in known or not known[name].persistent]
        check_all_used(ignored, needless, f"ignore, among tensors that {self._checkpoint.path} has and the model lacks")
        left = {name for name in needless if any(pattern.matches(name) for pattern in ignored)}
        self._name_missing(left)
        left |= {name for name in needless if name in known and _stays(known[name], rows[name])}
        self._taken = {name: row for name, row in rows.items() if name in known and name not in left}

    def _name_missing(self, left: Collection[str]) -> None:
        missed = [
            name for name, row in self._rows.items() if name not in self._slots and row.persistent and name not in left
        ]
        self.problems += [f"{name} is in the file, not in the model" for name in missed]
        if missed:
            hint = compiled_hint(self._model, missed)
            self.problems[-1] += f" (with ignore=[...] such tensors stay in the file){hint}"

    def _place(self) -> None:
        """Give every slot its row. A name that the file lacks is filled if the model ties it to one that it has."""
        home = {id(self._slots[name].tensor): row.holder for name, row in self._taken.items()}
        for name, slot in self._slots.items():
            row = self._taken.get(name)
            stored = home.get(id(slot.tensor)) if row is None else row.holder
            if stored is not None:
                self._put(slot, stored)
            elif slot.persistent:
                self._absent.append(name)
            elif slot.tensor.is_meta:
                self.bare.append(slot)

    def _put(self, slot: Slot, stored: str) -> None:
        first = self._takers.get(slot.key)
        if first is None:  # a module at two paths is filled once
            self._takers[slot.key] = stored
            self.places[stored].append(slot)
        elif first != stored and not self._checkpoint.same(first, stored):
            self.problems.append(
                f"{first} and {slot.name} are one tensor in the model, but two different ones in the file"
            )
        row = self._rows[stored]
        self.problems += misfits(row, slot, self._beside.get(slot.name))
        self.problems += _turned(self._checkpoint, row, slot)

    def _check_absent(self) -> None:
        """Name each tensor that the file lacks, and the one that `tie_weights` of the model would tie it to."""
        tied = ties(self._model, self._absent, self._taken) if self._absent else {}
        for name in self._absent:
            advice = f" (call the model's tie_weights() first, which ties it to {tied[name]})" if name in tied else ""
            self.problems.append(f"{name} is in the model, not in the file{advice}")


def _stays(slot: Slot, row: LedgerRow) -> bool:
    """Whether a non-persistent buffer keeps the model's value although the file has a tensor of its name.

    As in torch, loading need not restore such a buffer. Its shape may have changed in a forward pass before saving, and
    its values may be rounded in a file made from a checkpoint.
    """
    if nn.parameter.is_lazy(slot.tensor) or slot.tensor.is_floating_point() != row.dtype.is_floating_point:
        return True
    return not slot.tensor.is_meta and (tuple(slot.tensor.shape) != row.shape or row.spec is not None)


def misfits(row: LedgerRow, slot: Slot, beside: str | None) -> list[str]:
    """List the reasons why a tensor of a file cannot go to a slot; `beside` is one that the model gives."""
    if nn.parameter.is_lazy(slot.tensor):
        return [f"{slot.name} is not initialized in the model; run it once before loading"]
    if tuple(slot.tensor.shape) != row.shape and slot.persistent:
        return [f"{slot.name} has shape {row.shape} in the file, {tuple(slot.tensor.shape)} in the model"]
    if slot.tensor.is_floating_point() != row.dtype.is_floating_point:
        return [f"{slot.name} is {dtype_name(row.dtype)} in the file, {dtype_name(slot.tensor.dtype)} in the model"]
    if row.spec is None or not slot.is_parameter:  # a buffer takes the dequantized tensor
        return []
    obstacle = beside or obstacle_to(slot.module, slot.local)
    problem = f"{slot.name} is {row.scheme} in the file, but {obstacle}: exclude it, or load without into="
    return [problem] if obstacle else []


def _turned(checkpoint: Checkpoint | ForeignCheckpoint | RenamedCheckpoint, row: LedgerRow, slot: Slot) -> list[str]:
    """Problems of a layer that has inputs as rows, with a weight that another tool stored for a Linear layer."""
    of_linear = not isinstance(checkpoint, Checkpoint) and row.name in checkpoint.of_linear
    if not of_linear or layout_of(slot.module, slot.local, slot.tensor)[0] == Layout.of(slot.tensor.shape):
        return []
    kind = type(slot.module).__name__
    return [f"{row.name} has one row per output in the file, but {kind} has one column per output: load without into="]


def unrounded(row: LedgerRow, places: Sequence[Slot], model: nn.Module) -> list[str]:
    """List problems of a weight with quantized inputs that goes to layers which do not quantize inputs that way."""
    places = [slot for slot in places if slot.is_parameter]
    if row.spec is None or row.spec.activations is None or not places:
        return []
    if any(nn.parameter.is_lazy(slot.tensor) for slot in places):
        return []  # without a shape it has no layout; `misfits` names it
    rounding = [slot for slot in places if rounds_inputs(slot.module, slot.local, parent_of(model, slot))]
    if rounding and all(layout_of(slot.module, slot.local, slot.tensor)[0] == row.layout for slot in rounding):
        return []
    why = "has its inputs on other axes" if rounding else "does not quantize its inputs"
    return [
        f"{row.name} is {row.scheme} in the file, but {type(places[0].module).__name__} {why}: "
        f"quantize it with overrides={{{row.name!r}: {{'activations': None}}}}"
    ]
