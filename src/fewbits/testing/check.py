"""`Check`, one named requirement of an interface, and `ConformanceError`, which a failed check raises."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import attrs
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy

from fewbits.errors import ArgumentError, FewbitsError

_Setup = TypeVar("_Setup")
_Strategy = TypeVar("_Strategy")

#: Default number of examples that a check draws.
EXAMPLES = 10


class ConformanceError(FewbitsError, AssertionError):
    """A strategy breaks a promise of its interface. The message cites the docstring with the promise."""


@attrs.frozen
class Contract:
    """A promise in a docstring.

    Attributes:
        where: the dotted name of the documented class or function.
        quote: the words of the promise.
    """

    where: str
    quote: str

    def __str__(self) -> str:
        return f"{self.where}: {self.quote!r}"


@attrs.frozen
class Check:
    """One requirement of an interface. Calling it raises if the requirement is not met.

    Attributes:
        name: the requirement, in words joined by underscores.
        subject: the name of the class under test.
    """

    name: str
    subject: str
    _run: Callable[[], None] = attrs.field(repr=False, eq=False)

    def __call__(self) -> None:
        """Run the check.

        Raises:
            ConformanceError: if the requirement is not met, or the strategy raises another error.
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
    """Make a check from every function, with its name."""
    name = type(subject).__name__
    return [Check(function.__name__, name, functools.partial(function, setup)) for function in functions]


def check_functions(*modules: str) -> list[Callable[[Any], None]]:
    """Collect the checks of these modules: all public functions whose only parameter is `setup`."""
    found = [value for module in modules for value in vars(sys.modules[module]).values() if inspect.isfunction(value)]
    public = [one for one in found if one.__module__ in modules and not one.__name__.startswith("_")]
    return [one for one in public if [*inspect.signature(one).parameters] == ["setup"]]


def expect(holds: bool, wrong: str, contract: Contract) -> None:
    """Raise if a condition does not hold.

    Raises:
        ConformanceError: with the fault and the promise.
    """
    if not holds:
        fail(wrong, contract)


def fail(wrong: str, contract: Contract) -> NoReturn:
    """Raise an error with the fault and the promise.

    Raises:
        ConformanceError: always.
    """
    raise ConformanceError(f"{wrong}\n    {contract}")


def for_all(examples: int, holds: Callable[..., None], *strategies: SearchStrategy[Any]) -> None:
    """Call `holds` with values drawn from `strategies`.

    The active Hypothesis profile decides whether the values repeat in every run.

    Raises:
        Exception: the error that `holds` raises for the simplest failing values.
    """
    settings(max_examples=examples, deadline=None, report_multiple_bugs=False, suppress_health_check=list(HealthCheck))(
        given(*strategies)(holds)
    )()


def copy_of(value: _Strategy, kind: type, function: str) -> _Strategy:
    """Copy a strategy, and check its type.

    Raises:
        ArgumentError: if it has another type; the usual mistake is to pass its class.
    """
    if not isinstance(value, kind):
        raise ArgumentError(f"{function} takes an instance of {kind.__name__}, newly made, not {value!r}")
    return copy.deepcopy(value)
