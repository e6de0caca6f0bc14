"""`Check`, one named requirement of an interface, and `ConformanceError`, which a failed check raises."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, Generic, NoReturn, TypeVar

import attrs
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy

from fewbits.errors import ArgumentError, FewbitsError

_Strategy = TypeVar("_Strategy")

#: Default number of examples that a check draws.
EXAMPLES = 10


class ConformanceError(FewbitsError, AssertionError):
    """A strategy breaks a promise of its interface. The message names the fault, the check, and the promise."""


@attrs.frozen
class Setup(Generic[_Strategy]):
    """A strategy to check.

    Attributes:
        recipe: The original strategy. The checks use copies.
        examples: The number of examples that a check draws.
    """

    recipe: _Strategy
    examples: int

    def make(self) -> _Strategy:
        """Copy the strategy."""
        return copy.deepcopy(self.recipe)


@attrs.frozen
class Check:
    """One requirement of an interface. Calling it raises if the requirement is not met.

    Attributes:
        name: The requirement, in words joined by underscores.
        subject: The name of the class under test.
        promise: The requirement, in a sentence or two.
    """

    name: str
    subject: str
    promise: str = attrs.field(repr=False)
    _run: Callable[[], None] = attrs.field(repr=False, eq=False)

    def __call__(self) -> None:
        """Run the check.

        Raises:
            ConformanceError: if the requirement is not met, or the strategy raises another error.
        """
        try:
            self._run()
        except Exception as error:
            fault = str(error) if isinstance(error, ConformanceError) else f"{type(error).__name__}: {error}"
            raise ConformanceError(f"{self.subject}, {self.name}: {fault}\n    Promise: {self.promise}") from error

    def __str__(self) -> str:
        return self.name


def checks_of(setup: Setup[Any], *modules: str) -> list[Check]:
    """Make a check from every public function of these modules whose only parameter is `setup`."""
    subject = type(setup.recipe).__name__
    values = [value for module in modules for value in vars(sys.modules[module]).values()]
    return [
        Check(value.__name__, subject, inspect.getdoc(value) or "", functools.partial(value, setup))
        for value in values
        if inspect.isfunction(value)
        and value.__module__ in modules
        and not value.__name__.startswith("_")
        and [*inspect.signature(value).parameters] == ["setup"]
    ]


def expect(holds: bool, fault: str) -> None:
    """Raise if a condition does not hold.

    Raises:
        ConformanceError: with the fault.
    """
    if not holds:
        fail(fault)


def fail(fault: str) -> NoReturn:
    """Raise an error.

    Raises:
        ConformanceError: always, with the fault.
    """
    raise ConformanceError(fault)


def expect_error(expected: type[Exception], what: str, call: Callable[[], object]) -> None:
    """Raise unless a call raises an error of this class.

    Args:
        expected: The class of the error.
        what: The call, in words.
        call: The call itself.

    Raises:
        ConformanceError: if the call raises no error, or an error of another class.
    """
    try:
        call()
    except expected:
        return
    except Exception as error:
        fail(f"{what} raises {type(error).__name__}, not {expected.__name__}: {error}")
    fail(f"{what} raises no error; it should raise {expected.__name__}")


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
