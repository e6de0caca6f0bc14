"""Make rounding strategies from their names, as configs and arguments give them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fewbits.errors import ArgumentError
from fewbits.observers.named import make_named
from fewbits.rounding import ROUNDINGS
from fewbits.rounding.base import Rounding
from fewbits.rounding.nearest import RoundToNearest

#: A strategy, its name, or a mapping with its ``name`` and its arguments.
RoundingRecipe = Rounding | str | Mapping[str, Any]


def resolve_rounding(recipe: RoundingRecipe | None) -> Rounding:
    """Make a strategy that is given by name; return any other unchanged. None rounds to the nearest code.

    Raises:
        ArgumentError: if `recipe` is neither a strategy nor the name of one.
    """
    if recipe is None:
        return RoundToNearest()
    if isinstance(recipe, Rounding):
        return recipe
    if isinstance(recipe, (str, Mapping)):
        return make_named("rounding", recipe, ROUNDINGS)
    known = ", ".join(map(repr, ROUNDINGS))
    raise ArgumentError(f"rounding must be an instance of Rounding, or the name of one: {known}; not {recipe!r}")
