"""Solve the multiple-choice knapsack problem: one option for each item, the least error within a budget of sizes.

The method is that of Dyer, Riha and Walker (1995): the linear relaxation gives a multiplier and a bound. Options that
cannot be part of a better solution than the one at hand are dropped. The few items that are left are combined exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import attrs
import torch
from torch import Tensor

#: The most partial solutions that are kept. Beyond it the solution is not proved to be the best one.
_STATES = 8192

#: Errors that differ by a smaller share are equal: sums of float64 differ by as much.
_EQUAL = 1e-12


@attrs.frozen(eq=False)
class Problem:
    """Items with options; an option that an item does not have is infinite in both tensors.

    Attributes:
        sizes: float64, (items, options), from 0 up.
        errors: float64, (items, options), from 0 up.
    """

    sizes: Tensor
    errors: Tensor

    def total(self, choice: Tensor) -> tuple[float, float]:
        """Return the size and the error of a choice, int64, (items,)."""
        at = choice.unsqueeze(1)
        size, error = (math.fsum(values.gather(1, at).flatten().tolist()) for values in (self.sizes, self.errors))
        return size, error

    def smallest(self) -> Tensor:
        """Return the smallest option of each item; of several, that with the least error."""
        least = self.sizes.amin(1, keepdim=True)
        return torch.where(self.sizes == least, self.errors, torch.inf).argmin(1)

    def transposed(self) -> Problem:
        """Return the problem of the least size within a budget of errors."""
        return Problem(self.errors, self.sizes)


@attrs.frozen(eq=False)
class Steps:
    """Exchanges of an option for a larger one with less error, along the convex hull of each item's options.

    The steps are sorted by slope, the largest first. The steps of one item are in order.

    Attributes:
        start: the smallest options: int64, (items,).
        item: int64, (steps,).
        to: the option after the step: int64, (steps,).
        size: how much larger the new option is: float64, (steps,).
        saved: how much less error it has: float64, (steps,).
        slope: the error that the step saves for each unit of size: float64, (steps,).
    """

    start: Tensor
    item: Tensor
    to: Tensor
    size: Tensor
    saved: Tensor
    slope: Tensor

    @classmethod
    def of(cls, problem: Problem) -> Steps:
        """Find the steps of all items."""
        start = problem.smallest()
        none = torch.zeros(0, dtype=torch.float64)
        rounds = [(none.long(), none.long(), none, none, none), *_rounds(problem, start)]
        item, to, size, saved, slope = (torch.cat(parts) for parts in zip(*rounds, strict=True))
        order = slope.sort(descending=True, stable=True).indices
        return cls(start, item[order], to[order], size[order], saved[order], slope[order])

    def applied(self, taken: Iterable[int]) -> Tensor:
        """Return the choice after some steps, given by their positions in rising order."""
        choice, items, options = self.start.tolist(), self.item.tolist(), self.to.tolist()
        for step in taken:
            choice[items[step]] = options[step]
        return torch.tensor(choice)

    def fitting(self, taken: int, left: float) -> list[int]:
        """List the first steps, and all later ones for which there is room.

        Args:
            taken: how many first steps are listed.
            left: the room beyond them.
        """
        fitting, missed = list(range(taken)), set()
        later = zip(self.item[taken:].tolist(), self.size[taken:].tolist(), strict=True)
        for step, (item, size) in enumerate(later, taken):
            if item in missed or size > left:
                missed.add(item)  # its next step begins where this one ends
            else:
                fitting.append(step)
                left -= size
        return fitting


def _rounds(problem: Problem, choice: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Yield the next step of each item that has one, until none has."""
    rows, before = torch.arange(len(choice)), torch.full((len(choice),), torch.inf, dtype=torch.float64)
    while len(rows):
        at = choice.unsqueeze(1)
        larger = problem.sizes[rows] - problem.sizes[rows].gather(1, at)
        saved = problem.errors[rows].gather(1, at) - problem.errors[rows]
        slopes = torch.where((larger > 0) & (saved > 0) & larger.isfinite(), saved / larger, 0.0)
        slope = slopes.amax(1)
        # Of options on one line, the farthest is the next one.
        to = torch.where(slopes == slope.unsqueeze(1), larger, -1.0).argmax(1, keepdim=True)
        # Rounding must not change the order of an item's steps.
        slope = torch.minimum(slope, before)
        has = slope > 0
        rows, choice, before, to = rows[has], to[has].squeeze(1), slope[has], to[has]
        yield rows, choice, larger[has].gather(1, to).squeeze(1), saved[has].gather(1, to).squeeze(1), before


@attrs.frozen(eq=False)
class Solution:
    """One option for each item.

    Attributes:
        choice: the options: int64, (items,).
        size: the sum of their sizes.
        error: the sum of their errors.
        bound: no choice within the budget has less error.
    """

    choice: Tensor
    size: float
    error: float
    bound: float

    @property
    def gap(self) -> float:
        """The largest possible distance from the least error, as a share of the error."""
        return (self.error - self.bound) / self.error if self.error > self.bound else 0.0


def solve(problem: Problem, budget: float) -> Solution | None:
    """Find the choice with the least error whose size is at most the budget; None if there is none.

    Args:
        problem: the items and their options.
        budget: the most size of all options together.
    """
    steps = Steps.of(problem)
    size, _ = problem.total(steps.start)
    if size > budget:
        return None
    after = size + steps.size.cumsum(0)
    taken = int((after <= budget).sum())
    if taken == len(steps.item):  # every item has its least error
        return _solution(problem, steps.applied(range(taken)), None)
    left = budget - (float(after[taken - 1]) if taken else size)
    first = steps.applied(steps.fitting(taken, left))
    best, bound = _Core(problem, budget, float(steps.slope[taken])).improved(first)
    return _solution(problem, best, bound)


def _solution(problem: Problem, choice: Tensor, bound: float | None) -> Solution:
    size, error = problem.total(choice)
    return Solution(choice, size, error, error if bound is None else min(bound, error))


class _Core:
    """The search among the options that may be part of a solution better than the one at hand.

    A choice has the error ``bound + sum(reduced) + multiplier * (budget - size)``, where `reduced`, which is never
    negative, is the distance of an option from its item's least ``error + multiplier * size``.

    Args:
        problem: the items and their options.
        budget: the most size.
        multiplier: the price of a unit of size.
    """

    def __init__(self, problem: Problem, budget: float, multiplier: float) -> None:
        self.problem, self.budget = problem, budget
        priced = problem.errors + multiplier * problem.sizes
        least = priced.amin(1, keepdim=True)
        self.bound = math.fsum(least.flatten().tolist()) - multiplier * budget
        self.reduced = torch.where(priced.isinf(), torch.inf, priced - least)
        self.base = self.reduced.argmin(1)

    def improved(self, first: Tensor) -> tuple[Tensor, float | None]:
        """Return the best choice, and a bound on the error of all choices; None if the choice is the best one.

        Args:
            first: a choice within the budget.
        """
        least = self.problem.total(first)[1]
        room = least - self.bound
        if room <= _EQUAL * least:
            return first, None
        open_items = self._open(room)
        states = _States(self.problem, self.base, open_items, self.budget)
        best, complete = None, True
        for position in range(len(open_items)):
            complete &= states.extend(position, self.reduced, room)
            if (error := states.least_error()) < least:
                best, least = states.best(), error
                room = least - self.bound
        if best is not None:
            first = self.base.clone()
            first[open_items[: len(best)]] = torch.tensor(best)
        return first, None if complete else self.bound

    def _open(self, room: float) -> Tensor:
        """The items with several options that may be part of a better choice; the nearest decisions come first."""
        several = (self.reduced < room).sum(1) > 1
        items = several.nonzero().squeeze(1)
        second = self.reduced[items].sort(1).values[:, 1]
        return items[second.sort(stable=True).indices]


class _States:
    """Choices for the first open items; every other item has its base option.

    Attributes:
        size, error: of all items together: float64, (states,).
        reduced: the sum of the reduced errors: float64, (states,).
    """

    def __init__(self, problem: Problem, base: Tensor, items: Tensor, budget: float) -> None:
        self._sizes, self._errors, self._items, self._budget = problem.sizes, problem.errors, items, budget
        self._base = base
        size, error = problem.total(base)
        self.size, self.error, self.reduced = (torch.tensor([start], dtype=torch.float64) for start in (size, error, 0))
        # How much smaller the open items from each position on can be than their base options.
        saved = (problem.sizes.gather(1, base.unsqueeze(1)).squeeze(1) - problem.sizes.amin(1))[items]
        self._saved = torch.cat([saved.flip(0).cumsum(0).flip(0), saved.new_zeros(1)])
        self._steps: list[tuple[Tensor, Tensor]] = []

    def extend(self, position: int, reduced: Tensor, room: float) -> bool:
        """Choose for one more item.

        Args:
            position: of the item among the open ones.
            reduced: the reduced errors of all options.
            room: states whose reduced error is not below it cannot become better than the best choice known.

        Returns:
            whether all states were kept that can become better.
        """
        item = int(self._items[position])
        options = (reduced[item] < room).nonzero().squeeze(1)
        base = self._base[item]
        size = self.size.unsqueeze(1) + (self._sizes[item, options] - self._sizes[item, base])
        error = self.error.unsqueeze(1) + (self._errors[item, options] - self._errors[item, base])
        price = self.reduced.unsqueeze(1) + reduced[item, options]
        fits = (size - self._saved[position + 1] <= self._budget) & (price < room)
        parent, option = fits.nonzero(as_tuple=True)
        kept = _undominated(size[fits], error[fits])
        complete = len(kept) <= _STATES
        if not complete:
            kept = kept[price[fits][kept].topk(_STATES, largest=False).indices.sort().values]
        self.size, self.error, self.reduced = (values[fits][kept] for values in (size, error, price))
        self._steps.append((parent[kept].int(), options[option[kept]].int()))
        return complete

    def least_error(self) -> float:
        """Return the least error of a state within the budget; infinity if there is none."""
        return float(self._within().amin()) if len(self.size) else math.inf

    def best(self) -> list[int]:
        """Return the options of the state with the least error, for the items chosen so far."""
        state, chosen = int(self._within().argmin()), []
        for parent, option in reversed(self._steps):
            chosen.append(int(option[state]))
            state = int(parent[state])
        return chosen[::-1]

    def _within(self) -> Tensor:
        return torch.where(self.size <= self._budget, self.error, torch.inf)


def _undominated(size: Tensor, error: Tensor) -> Tensor:
    """List the states that have less error than all smaller ones, by size."""
    order = error.sort(stable=True).indices
    order = order[size[order].sort(stable=True).indices]
    least = error[order].cummin(0).values
    first = torch.ones(len(order), dtype=torch.bool)
    first[1:] = error[order][1:] < least[:-1]
    return order[first]
