"""`Check`: one named requirement, to be called; `ConformanceError`: what it raises where it is not met."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import attrs
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy

from fewbits.errors import ArgumentError, FewbitsError

_Setup = TypeVar("_Setup")
_Strategy = TypeVar("_Strategy")

#: How many examples a check that draws them looks at, unless it is told otherwise.
EXAMPLES = 10


class ConformanceError(FewbitsError, AssertionError):
    """A strategy does not do what its interface promises; the message cites the docstring that promises it."""


@attrs.frozen
class Contract:
    """A promise, and the docstring that states it.

    Attributes:
        where: the dotted name of the class or function with the docstring.
        quote: what it says there.
    """

    where: str
    quote: str

    def __str__(self) -> str:
        return f"{self.where}: {self.quote!r}"


@attrs.frozen
class Check:
    """One requirement of an interface. Calling it does nothing if it is met.

    Attributes:
        name: what is required, in words joined by underscores.
        subject: the class that is checked.
    """

    name: str
    subject: str
    _run: Callable[[], None] = attrs.field(repr=False, eq=False)

    def __call__(self) -> None:
        """Run the check.

        Raises:
            ConformanceError: if the requirement is not met, or anything else is raised on the way.
        """
        try:
            self._run()
        except ConformanceError:
            raise
        except Exception as error:
            raise ConformanceError(f"{self.subject}, {self.name}: {type(error).__name__}: {error}") from error

    def __str__(self) -> str:
        return self.name


def checks(subject: object, functions: Sequence[Callable[[_Setup], None]], setup: _Setup) -> list[Check]:
    """A check for every function, named after it."""
    name = type(subject).__name__
    return [Check(function.__name__, name, functools.partial(function, setup)) for function in functions]


def expect(holds: bool, wrong: str, contract: Contract) -> None:
    """Go on if something holds.

    Raises:
        ConformanceError: with what is wrong and what was promised, if it does not.
    """
    if not holds:
        fail(wrong, contract)


def fail(wrong: str, contract: Contract) -> NoReturn:
    """Say what is wrong, and what was promised.

    Raises:
        ConformanceError: always.
    """
    raise ConformanceError(f"{wrong}\n    {contract}")


def for_all(examples: int, holds: Callable[..., None], *strategies: SearchStrategy[Any]) -> None:
    """Call `holds` with values drawn from `strategies`.

    Whether they are the same at every run is decided by the Hypothesis profile that is in force.

    Raises:
        Exception: what `holds` raises for the simplest values that were found to make it.
    """
    settings(max_examples=examples, deadline=None, report_multiple_bugs=False, suppress_health_check=list(HealthCheck))(
        given(*strategies)(holds)
    )()


def copy_of(value: _Strategy, kind: type, function: str) -> _Strategy:
    """A copy of a strategy, if it is one of the right kind.

    Raises:
        ArgumentError: if it is not; the usual mistake is to pass its class.
    """
    if not isinstance(value, kind):
        raise ArgumentError(f"{function} takes an instance of {kind.__name__}, newly made, not {value!r}")
    return copy.deepcopy(value)
