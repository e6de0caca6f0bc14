"""Suggest the nearest known names for a name that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from fewbits.errors import ArgumentError


def nearest(word: str, known: Iterable[str], n: int = 1) -> list[str]:
    """Return the known names that `word` may be a misspelling of, the nearest first, ignoring case.

    Names with different digits are never suggested: ``int3`` is not a misspelling of ``int8``, nor ``layers.12`` of
    ``layers.1``.

    >>> nearest("Int8_tensor", ["int8-tensor", "int4"]), nearest("int3", ["int8", "int4"])
    (['int8-tensor'], [])
    """
    alike = {name.lower(): name for name in known if _digits(name) == _digits(word)}
    return [alike[match] for match in difflib.get_close_matches(word.lower(), alike, n=n)]


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """Suggest the nearest known name, as the end of a sentence; "" if no name is near.

    >>> did_you_mean("in4", ["int4", "fp16"])
    " (did you mean 'int4'?)"
    """
    return advice(nearest(str(word), known))


def advice(names: Iterable[str]) -> str:
    """Ask whether one of these names was meant, as the end of a sentence; "" without names."""
    proposed = " or ".join(map(repr, names))
    return f" (did you mean {proposed}?)" if proposed else ""


def checked_name(kind: str, name: object, known: Iterable[str]) -> str:
    """Return the name if it is known.

    Raises:
        ArgumentError: if it is not known; the message suggests the nearest name and lists all names.
    """
    if not isinstance(name, str) or name not in known:
        raise ArgumentError(
            f"there is no {kind} {name!r}{did_you_mean(name, known)}; there are {', '.join(map(repr, known))}"
        )
    return name


def _digits(word: str) -> set[str]:
    return {character for character in word if character.isdigit()}
