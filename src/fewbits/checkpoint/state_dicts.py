"""State dicts that are entries of something else, such as a training checkpoint: found, named, and taken out."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from fewbits.errors import ArgumentError
from fewbits.selection.nearest import did_you_mean

#: How many entries lead to a state dict, at most, how long their names are, and how many state dicts are named.
_DEPTH, _LENGTH, _SHOWN = 3, 200, 8


def entry_of(saved: object, entry: str, kind: type, where: object) -> object:
    """An entry by its name; a dot leads from an entry to one within.

    Args:
        saved: the object in the file.
        entry: the name of the entry.
        kind: the class of the tensors in `saved`; they have a dtype.
        where: the name of `saved` in errors.

    Raises:
        ArgumentError: if it has no entry of that name.
    """
    if not isinstance(entry, str):
        raise ArgumentError(f"entry must be the name of an entry, not {entry!r}")
    # Dots in names make some entries ambiguous; `advice` names those that look like state dicts.
    found = list(_readings(saved, entry))
    if not found:
        names = [name for name in saved if isinstance(name, str)] if isinstance(saved, Mapping) else []
        hint = advice(saved, kind)
        raise ArgumentError(f"{where} has no entry {entry!r}{did_you_mean(entry, names)}{hint}")
    return next((value for value in found if isinstance(value, Mapping) and _looks_like_one(value, kind)), found[0])


def advice(saved: object, kind: type) -> str:
    """How to take one of the entries that look like state dicts, as the end of a sentence; "" if none does."""
    names = list(islice(_state_dicts(saved, kind), _SHOWN))
    if not names:
        return ""
    quoted = ", ".join(map(repr, names))
    which = f"the entry {quoted} looks like a state dict: take it"
    if len(names) > 1:
        which = f"the entries {quoted} look like state dicts: take one of them"
    return f"; {which} with --entry {shlex.quote(names[0])}, or entry={names[0]!r}"


def _readings(saved: Any, entry: str) -> Iterator[Any]:
    """Yield the values that a name may stand for: the entry of that name, then entries within entries."""
    if not isinstance(saved, Mapping):
        return
    if entry in saved:
        yield saved[entry]
    for at, letter in enumerate(entry):
        if letter == "." and entry[:at] in saved:
            yield from _readings(saved[entry[:at]], entry[at + 1 :])


def _state_dicts(saved: object, kind: type) -> Iterator[str]:
    """The names of entries that look like state dicts. Each mapping is looked at once: it may be there many times."""
    seen: set[int] = set()

    def within(mapping: Mapping[object, object], prefix: str, depth: int) -> Iterator[str]:
        for name, value in mapping.items():
            if not isinstance(name, str) or len(name) > _LENGTH or not isinstance(value, Mapping) or id(value) in seen:
                continue
            seen.add(id(value))
            if _looks_like_one(value, kind):
                yield prefix + name
            elif depth > 1 and "param_groups" not in value:  # the state of an optimizer has tensors by names, too
                yield from within(value, f"{prefix}{name}.", depth - 1)

    return within(saved, "", _DEPTH) if isinstance(saved, Mapping) else iter(())


def _looks_like_one(saved: Mapping[object, object], kind: type) -> bool:
    """Whether it maps names to tensors, at least half of them floating."""
    if not saved or not all(isinstance(name, str) and isinstance(value, kind) for name, value in saved.items()):
        return False
    floating = sum(value.dtype.is_floating_point for value in saved.values())  # type: ignore[attr-defined]
    return 2 * floating >= len(saved)
