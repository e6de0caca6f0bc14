"""Make observers from their names, as configs and arguments give them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

from fewbits.errors import ArgumentError
from fewbits.observers import OBSERVERS
from fewbits.observers.base import Observer
from fewbits.selection.nearest import checked_name, did_you_mean

_Strategy = TypeVar("_Strategy")

#: An observer, its name, or a mapping with its ``name`` and its arguments.
ObserverRecipe = Observer | str | Mapping[str, Any]


def make_observer(setting: str, recipe: str | Mapping[str, Any]) -> Observer:
    """Make an observer from its name, or from a mapping with its name and arguments.

    Args:
        setting: the name of the setting, for messages: ``"observer"`` or ``"activation_observer"``.
        recipe: a name or a mapping, such as ``"percentile"`` or ``{"name": "percentile", "percentile": 99.9}``.

    Raises:
        ArgumentError: if there is no such observer, or it does not take an argument; the message names the setting.
    """
    return make_named(setting, recipe, OBSERVERS)


def make_named(setting: str, recipe: str | Mapping[str, Any], classes: Mapping[str, type[_Strategy]]) -> _Strategy:
    """Make a strategy of one of these classes from its name, or from a mapping with its name and arguments.

    Args:
        setting: the name of the setting, for messages.
        recipe: such as ``"percentile"`` or ``{"name": "percentile", "percentile": 99.9}``.
        classes: the classes by name.

    Raises:
        ArgumentError: if there is no such class, or it does not take an argument; the message names the setting.
    """
    arguments: dict[str, Any] = {"name": recipe} if isinstance(recipe, str) else dict(recipe)
    name = checked_name(setting, arguments.pop("name", None), classes)
    cls = classes[name]
    known = accepted_arguments(cls)  # type: ignore[arg-type]  # mypy takes no class with a type variable for hashable
    for argument in arguments:
        if argument not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes no arguments"
            raise ArgumentError(
                f"{setting}: {name!r} does not take {argument!r}{did_you_mean(argument, known)}; {takes}"
            )
    return cls(**arguments)


@functools.cache
def accepted_arguments(cls: type) -> tuple[str, ...]:
    """Return the names of the arguments that a class, or a base class through ``**kwargs``, takes in `__init__`."""
    known: dict[str, None] = {}
    for base in cls.__mro__[:-1]:
        if "__init__" in vars(base):
            parameters = list(inspect.signature(base.__init__).parameters.values())[1:]  # type: ignore[misc]
            known.update((p.name, None) for p in parameters if p.kind is not p.VAR_KEYWORD)
    return tuple(known)
