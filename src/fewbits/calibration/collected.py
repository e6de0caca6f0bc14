"""Collect the inputs of weights batch by batch, and sort weights into groups whose inputs are taken together."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from fewbits.errors import CalibrationError
from fewbits.rounding.base import RowInputs
from fewbits.rounding.statistics import InputStatistics, Needs

#: The name of a weight, and the first row and the row after the last of its matrix.
Key = tuple[str, int, int]


class Collected:
    """The inputs of weights in one batch, and the statistics of all batches so far."""

    def __init__(self, needs: Needs) -> None:
        self._needs = needs
        self._batch: dict[Key, list[Tensor]] = {}
        self._statistics: dict[Key, InputStatistics] = {}

    def receive(self, name: str, rows: slice, x: Tensor) -> None:
        """Keep a copy of some inputs: a forward may overwrite them."""
        copied = x.detach().to(torch.float32, copy=True)
        self._batch.setdefault((name, rows.start, rows.stop), []).append(copied)

    def add(self, inputs: Mapping[Key, Tensor]) -> None:
        """Add inputs that another `Collected` has taken."""
        for key, x in inputs.items():
            self._batch.setdefault(key, []).append(x)

    def taken(self) -> dict[Key, Tensor]:
        """Return the inputs of this batch, and forget them."""
        batch, self._batch = self._batch, {}
        return {key: parts[0] if len(parts) == 1 else torch.cat(parts) for key, parts in batch.items()}

    def end_batch(self, references: Mapping[Key, Tensor] | None = None) -> None:
        """Add the inputs of this batch to the statistics.

        Args:
            references: the inputs in the float model. Where their number differs, because experts got other tokens,
                they are not used.
        """
        for key, x in self.taken().items():
            reference = None if references is None else references.get(key)
            if key not in self._statistics:
                self._statistics[key] = InputStatistics(x.shape[1], self._needs)
            fits = reference is not None and reference.shape == x.shape
            try:
                self._statistics[key].add(x, reference if fits else None)
            except CalibrationError as error:
                raise CalibrationError(f"the inputs of {key[0]}: {error}") from None

    def of(self, name: str, rows: slice | None = None) -> list[RowInputs]:
        """Return the statistics of one weight.

        Where rows had inputs in several ways, as those of an attention projection that is used as a whole and in parts,
        the way with the most inputs counts.

        Args:
            name: the name of the weight.
            rows: the rows of another weight that has the same inputs; None for the rows of this weight.
        """
        own = [(key[1:], known) for key, known in self._statistics.items() if key[0] == name]
        found: list[RowInputs] = []
        for (start, stop), known in sorted(own, key=lambda pair: -pair[1].count):
            if all(stop <= other.rows.start or other.rows.stop <= start for other in found):
                found.append(RowInputs(slice(start, stop), known))
        return found if rows is None else [RowInputs(rows, each.statistics) for each in found]


class Grouping:
    """Sorts the weights of a block into groups that do not depend on one another, in the order in which they are used.

    Weights with one input are a group, such as the query, key and value projections of attention. Weights of parallel
    modules are a group too: those whose names differ only in a number that is the index of a `nn.ModuleList`, such as
    experts.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._last: tuple[str, Tensor] | None = None
        self._earlier: frozenset[str] = frozenset()
        self._groups: list[list[str]] = []
        self._where: dict[str, int] = {}
        self._shared: dict[str, str] = {}
        self._rows: dict[str, slice] = {}
        self._uses: dict[str, list[int]] = {}
        self._events, self._end = 0, math.inf

    def receive(self, name: str, rows: slice, x: Tensor) -> None:
        """Take note that a weight was multiplied with an input."""
        self._events += 1
        before, self._last = self._last, (name, x)
        if name in self._earlier:
            return
        self._uses.setdefault(name, []).append(self._events)
        self._rows[name] = rows
        if name in self._where:
            self._shared.pop(name, None)  # several inputs: they are collected one by one
        elif before is not None and _same(before[1], x):
            self._shared[name] = self._shared.get(before[0], before[0])
            self._put(name, self._where[before[0]])
        else:
            self._put(name, self._where.get(self._pattern(name), len(self._groups)))

    def _put(self, name: str, at: int) -> None:
        """Add a weight to a group, which weights of parallel modules join from now on."""
        if at == len(self._groups):
            self._groups.append([])
        self._groups[at].append(name)
        self._where[name] = self._where[self._pattern(name)] = at

    def begin_batch(self) -> None:
        """Look only for weights that were not used in the batches before, such as experts that had no tokens."""
        self._earlier, self._last = frozenset(self._uses), None
        self._end = min(self._end, self._events + 1)

    def lacks(self, names: Collection[str]) -> bool:
        """Whether some of these weights were not used so far."""
        return not self._uses.keys() >= set(names)

    @property
    def groups(self) -> list[list[str]]:
        """The groups of weights so far, in the order in which each was first seen; the list itself, not a copy."""
        return self._groups

    def later(self, group: Sequence[str]) -> list[str]:
        """Return weights of the first batch that are used only after the last use of a group."""
        last = max(self._uses[name][-1] for name in group)
        return [name for name, uses in self._uses.items() if last < uses[0] < self._end]

    def apart(self, group: Sequence[str]) -> list[list[str]]:
        """Divide a group into the weights that share an input, in the order in which they are used."""
        parts: dict[str, list[str]] = {}
        for name in sorted(group, key=lambda name: self._uses[name][0]):
            parts.setdefault(self.leader(name), []).append(name)
        return list(parts.values())

    def leader(self, name: str) -> str:
        """Return the first weight of the group that has the same input; weights that are used twice lead themselves."""
        leader = self._shared.get(name, name)
        return leader if len(self._uses[leader]) == 1 else name

    def only_rows(self, name: str) -> slice | None:
        """Return the rows that the one use of a weight is about; None if it was used more often."""
        return self._rows[name] if len(self._uses[name]) == 1 else None

    def followed_rows(self, name: str) -> slice | None:
        """Return the rows of a weight that see the inputs of its leader; None if it leads itself."""
        return None if self.leader(name) == name else self._rows[name]

    def _pattern(self, name: str) -> str:
        """Replace the indices of ModuleLists in a name."""
        parts, module = name.split("."), self._model
        for at, part in enumerate(parts[:-1]):
            if isinstance(module, nn.ModuleList):
                parts[at] = "*"
            module = module.get_submodule(part)
        return ".".join(parts)


def _same(x: Tensor, y: Tensor) -> bool:
    """Tell whether two tensors that are both alive are the same view of the same memory."""
    return (x.data_ptr(), x.shape, x.stride()) == (y.data_ptr(), y.shape, y.stride())
