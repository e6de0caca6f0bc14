"""`Budget`: the limit under which an allocation has the least error, or the least size."""

from __future__ import annotations

import math
from typing import Any

import attrs
import torch

from fewbits._sizes import parse_size
from fewbits.errors import ArgumentError
from fewbits.planning.knapsack import Problem, Solution, solve

_NAMES = ("bits_per_weight", "target_size", "max_kl")


def _is_positive(_: Any, attribute: attrs.Attribute[Any], value: object) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
    if value is not None and not is_number:
        raise ArgumentError(f"{attribute.name} must be a number above 0, not {value!r}")


def _bytes(size: int | str | None) -> int | None:
    return None if size is None else parse_size(size, "target_size")


@attrs.frozen(kw_only=True)
class Budget:
    """One limit, and perhaps the least SQNR of every weight.

    Attributes:
        bits_per_weight: the bits of all tensors together, over the number of their elements.
        target_size: the bytes of all tensors together.
        max_kl: the predicted KL divergence from the float model, in nats for each position.
        min_sqnr: the SQNR that every weight has at least, in dB. Alone, the result is the smallest such one.

    Raises:
        ArgumentError: without a limit, with more than one, or for a number that is not above 0.
    """

    bits_per_weight: float | None = attrs.field(default=None, validator=_is_positive)
    target_size: int | None = attrs.field(default=None, converter=_bytes)
    max_kl: float | None = attrs.field(default=None, validator=_is_positive)
    min_sqnr: float | None = attrs.field(default=None, validator=_is_positive)

    def __attrs_post_init__(self) -> None:
        given = [name for name in _NAMES if getattr(self, name) is not None]
        if len(given) > 1 or (not given and self.min_sqnr is None):
            raise ArgumentError(
                f"give one budget, {', '.join(_NAMES)} or min_sqnr, not {' and '.join(given) if given else 'none'}"
            )

    def bytes_for(self, elements: int) -> int | None:
        """Return the bytes of all tensors that the budget allows; None if it limits something else.

        Args:
            elements: the number of elements of all tensors.
        """
        return self.target_size if self.bits_per_weight is None else math.floor(self.bits_per_weight * elements / 8)

    def solved(self, problem: Problem, room: int | None) -> Solution:
        """Choose the options.

        Args:
            problem: the sizes and errors of the options that `min_sqnr` allows.
            room: the bytes that are left for them; None if the budget limits something else.

        Raises:
            ArgumentError: if no choice is within the budget.
        """
        if room is not None:
            return self._within(problem, room, "bytes are left for the weights, and the smallest choice has")
        if self.max_kl is not None:
            return self._within(problem.transposed(), self.max_kl, "nats are allowed, and the most exact choice has")
        choice = problem.smallest()
        size, error = problem.total(choice)
        return Solution(choice, size, error, error)

    @staticmethod
    def _within(problem: Problem, room: float, fault: str) -> Solution:
        solution = solve(problem, room)
        if solution is None:
            least, _ = problem.total(problem.smallest())
            raise ArgumentError(f"{room:,} {fault} {least:,.6g}; raise the budget, or give other candidates")
        return solution


def allowed(problem: Problem, sqnr_db: torch.Tensor, budget: Budget) -> Problem:
    """Leave out the options with less than the least SQNR.

    Args:
        problem: the sizes and errors of all options.
        sqnr_db: the least SQNR among the weights of an item: (items, options).
        budget: the budget.
    """
    if budget.min_sqnr is None:
        return problem
    enough = sqnr_db >= budget.min_sqnr
    return Problem(*(torch.where(enough, values, torch.inf) for values in (problem.sizes, problem.errors)))
