"""Choose among scored options, and write the choice as settings."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from fewbits.config.config import QuantizationConfig
from fewbits.errors import ArgumentError
from fewbits.planning.allocation import Allocated, Allocation
from fewbits.planning.budget import Budget, allowed
from fewbits.planning.candidates import Ledgers, planned
from fewbits.planning.curve import curve_of
from fewbits.planning.knapsack import Problem
from fewbits.planning.scoring import Score
from fewbits.planning.ties import groups_of
from fewbits.selection.ledger import Ledger
from fewbits.selection.row import LedgerRow


@attrs.frozen(eq=False)
class Options:
    """The weights that have a choice.

    Attributes:
        rows: the row of each weight with each candidate, by name.
        groups: the names of weights that get the same candidate.
        kept: the rows of all other tensors.
    """

    rows: Mapping[str, Sequence[LedgerRow]]
    groups: Sequence[Sequence[str]]
    kept: Sequence[LedgerRow]

    @classmethod
    def of(cls, ledgers: Ledgers, together: Sequence[Sequence[str]] | None) -> Options:
        """Find the weights whose rows differ between candidates, and group them; see `groups_of`.

        Raises:
            ArgumentError: if no weight has a choice.
            SelectionError: as `groups_of`.
        """
        all_rows = {row.name: ledgers.rows(row.name) for row in ledgers.any.stored}
        rows = {name: found for name, found in all_rows.items() if len({row.spec for row in found}) > 1}
        if not rows:
            raise ArgumentError("no tensor has a choice: all candidates store every tensor alike")
        kept = [found[0] for name, found in all_rows.items() if name not in rows]
        return cls(rows, groups_of(rows, together), kept)

    @property
    def firsts(self) -> list[LedgerRow]:
        """A row for each weight that has its layout."""
        return [next((row for row in rows if row.layout is not None), rows[0]) for rows in self.rows.values()]

    @property
    def choosable(self) -> int:
        """The number of elements of the weights that have a choice."""
        return sum(math.prod(row.shape) for row in self.firsts)

    @property
    def elements(self) -> int:
        """The number of elements of all tensors."""
        return self.choosable + sum(math.prod(row.shape) for row in self.kept)


@attrs.frozen(eq=False)
class Choice:
    """Chooses a candidate for every group of weights.

    Attributes:
        source, entry: as in `fewbits.allocate`.
        ledgers: the ledgers of all candidates.
        options: the weights that have a choice.
        scores: the scores of each weight with each candidate, by name.
    """

    source: object
    entry: str | None
    ledgers: Ledgers
    options: Options
    scores: Mapping[str, Sequence[Score]]

    def within(self, budget: Budget, label: str) -> Allocation:
        """Choose within a budget, and compare the ledger of the settings with the choice.

        Args:
            budget: the budget.
            label: the meaning of the errors.

        Raises:
            ArgumentError: if the budget cannot be met.
        """
        problem = self._problem()
        possible = allowed(problem, self._least_sqnr(), budget)
        self._check_possible(possible)
        kept, room = sum(row.bytes_after for row in self.options.kept), budget.bytes_for(self.options.elements)
        if room is not None and room < kept:
            raise ArgumentError(
                f"the tensors without a choice have {kept:,} bytes, and the budget allows {room:,}; raise the budget, "
                "or give the config fewer rules that keep tensors"
            )
        solution = budget.solved(possible, None if room is None else room - kept)
        pairs = zip(self.options.groups, solution.choice.tolist(), strict=True)
        chosen = {name: number for group, number in pairs for name in group}
        config = self._config(chosen)
        ledger = planned(self.source, self.entry, config)
        self._check_ledger(ledger, chosen)
        size, error = problem.total(solution.choice)
        curve = curve_of(possible, kept, label, (kept + round(size), error))
        return Allocation(config, ledger, tuple(self._weights(ledger, chosen)), error, label, solution.gap, curve)

    @property
    def _group_of(self) -> Tensor:
        """The number of the group of each weight, in the order of the names in the groups."""
        sizes = torch.tensor([len(group) for group in self.options.groups])
        return torch.arange(len(sizes)).repeat_interleave(sizes)

    @property
    def _names(self) -> list[str]:
        return [name for group in self.options.groups for name in group]

    def _problem(self) -> Problem:
        """The bytes and errors of all groups: float64, (groups, candidates)."""
        sizes = [[row.bytes_after for row in self.options.rows[name]] for name in self._names]
        errors = [[score.error for score in self.scores[name]] for name in self._names]
        return Problem(self._summed(sizes), self._summed(errors))

    def _summed(self, values: list[list[Any]]) -> Tensor:
        of_names = torch.tensor(values, dtype=torch.float64)
        return of_names.new_zeros(len(self.options.groups), of_names.shape[1]).index_add_(0, self._group_of, of_names)

    def _least_sqnr(self) -> Tensor:
        """The least SQNR in each group: float64, (groups, candidates)."""
        sqnr_db = torch.tensor([[score.sqnr_db for score in self.scores[name]] for name in self._names]).double()
        index = self._group_of.unsqueeze(1).expand_as(sqnr_db)
        least = torch.full((len(self.options.groups), sqnr_db.shape[1]), torch.inf, dtype=torch.float64)
        return least.scatter_reduce_(0, index, sqnr_db, "amin")

    def _check_possible(self, problem: Problem) -> None:
        """Refuse weights that no candidate rounds well enough."""
        impossible = problem.sizes.isinf().all(1).nonzero().flatten().tolist()
        if impossible:
            name = self.options.groups[impossible[0]][0]
            best = max(score.sqnr_db for score in self.scores[name])
            raise ArgumentError(
                f"no candidate has the least SQNR for {len(impossible)} groups of weights: {name} has {best:.2f} dB at "
                "best; lower min_sqnr, or add 'int8' or 'keep' to the candidates"
            )

    def _config(self, chosen: Mapping[str, int]) -> QuantizationConfig:
        """Write the choice as settings: the most frequent scheme for all, and the others as overrides."""
        candidates = self.ledgers.candidates
        if all(self.options.rows[name][number].spec is None for name, number in chosen.items()):
            raise ArgumentError("within this budget every tensor keeps its dtype: there is nothing to quantize")
        counts = Counter(number for number in chosen.values() if candidates[number].makes_codes)
        base = counts.most_common(1)[0][0] if counts else next(iter(self.ledgers.of_codes))
        with_base = self.ledgers.of_codes[base]
        config = candidates[base].config(self.ledgers.base)
        own = {}
        # Of several patterns that match, the last one wins: the longer name.
        for name, pattern in sorted(_patterns(chosen, with_base).items(), key=lambda pair: pair[0].count(".")):
            spec = self.options.rows[name][chosen[name]].spec
            if spec != with_base[name].spec or _is_within(name, chosen):
                own[pattern] = "keep" if spec is None else candidates[chosen[name]].rule
        return config.replace(overrides={**config.overrides, **own})

    def _check_ledger(self, ledger: Ledger, chosen: Mapping[str, int]) -> None:
        """Refuse settings that give a weight another spec than the choice: rules of the user may contradict it."""
        for name, number in chosen.items():
            if ledger[name].spec != self.options.rows[name][number].spec:
                raise ArgumentError(
                    f"{name} would be {ledger[name].scheme or ledger[name].fate}, not "
                    f"{self.ledgers.candidates[number].label}: {ledger[name].reason}; give the config fewer rules"
                )

    def _weights(self, ledger: Ledger, chosen: Mapping[str, int]) -> Iterator[Allocated]:
        for row in ledger.stored:
            if row.name in chosen:
                number = chosen[row.name]
                label, score = self.ledgers.candidates[number].label, self.scores[row.name][number]
                label = label if row.spec is not None else "keep"
                sqnr_db = score.sqnr_db if math.isfinite(score.sqnr_db) else None
                elements = math.prod(row.shape)
                yield Allocated(row.name, label, elements, row.bytes_after, sqnr_db, score.error)


def _patterns(names: Iterable[str], ledger: Ledger) -> dict[str, str]:
    """Return a pattern for each name: the name, or a regular expression where the name would match others too."""
    runs: Counter[str] = Counter()
    for row in ledger:
        parts = row.name.split(".")
        runs.update({".".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1)})
    plain = {name for name in names if runs[name] == 1 and not re.search(r"[*?]|^re:|^\.|\.\.|\.$", name)}
    return {name: name if name in plain else "re:" + re.escape(name) for name in names}


def _is_within(name: str, names: Container[str]) -> bool:
    """Whether the name of a tensor is the path of the module that holds this one; a pattern matches both."""
    return name.rpartition(".")[0] in names
