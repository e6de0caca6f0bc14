"""Making schemes and observers out of their names."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from fewbits.config.values import Table
from fewbits.errors import ArgumentError
from fewbits.observers import OBSERVERS
from fewbits.observers.base import Observer
from fewbits.quantizers.schemes import SCHEMES
from fewbits.selection.rules import did_you_mean


def checked_name(kind: str, name: object, known: Iterable[str]) -> str:
    """A name, if it is known.

    Raises:
        ArgumentError: with the nearest one, and all that there are.
    """
    if not isinstance(name, str) or name not in known:
        near = did_you_mean(str(name).lower(), known)
        raise ArgumentError(f"there is no {kind} {name!r}{near}; there are {', '.join(map(repr, known))}")
    return name


def make_observer(setting: str, recipe: object) -> Observer | None:
    """The observer that a name, or a table with a name and arguments, stands for.

    Raises:
        ArgumentError: naming the setting, if there is no such observer, or it does not take an argument.
    """
    if recipe is None:
        return None
    if not isinstance(recipe, (str, Table)):
        raise ArgumentError(
            f"{setting} is named in a config, such as 'percentile' or {{'name': 'percentile', 'percentile': 99.9}}, "
            f"not {recipe!r}; an observer of your own goes to quantize(..., {setting}=...)"
        )
    arguments: dict[str, Any] = {"name": recipe} if isinstance(recipe, str) else dict(recipe)
    name = checked_name(setting, arguments.pop("name", None), OBSERVERS)
    cls = OBSERVERS[name]
    known = _parameters(cls)
    for argument in arguments:
        if argument not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes no arguments"
            raise ArgumentError(
                f"{setting}: {name!r} does not take {argument!r}{did_you_mean(str(argument), known)}; {takes}"
            )
    return cls(**arguments)


def takers(setting: str) -> list[str]:
    """The short names of the schemes that take a setting."""
    return [name for name, cls in SCHEMES.items() if setting in _parameters(cls)]


def _parameters(cls: type) -> list[str]:
    """What a class can be made with: the arguments of its `__init__`, and of those it passes on to."""
    known: dict[str, None] = {}
    for base in cls.__mro__[:-1]:
        if "__init__" in vars(base):
            parameters = list(inspect.signature(base.__init__).parameters.values())[1:]  # type: ignore[misc]
            known.update((p.name, None) for p in parameters if p.kind is not p.VAR_KEYWORD)
    return list(known)
