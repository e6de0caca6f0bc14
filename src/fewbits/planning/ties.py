"""Tensors that get the same candidate, because servers join them into one matrix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from fewbits.errors import SelectionError

#: Names of layers that have the same input, which servers such as vLLM join: query, key and value; gate and up.
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"), ("w1", "w3"))


def groups_of(names: Iterable[str], together: Sequence[Sequence[str]] | None) -> list[list[str]]:
    """Group names of tensors that differ only in one part, and whose parts are in one family.

    Args:
        names: the names of the tensors.
        together: families of parts; None takes `SAME_INPUT`, and an empty sequence groups nothing.

    Returns:
        the groups, in the order of their first names; a tensor without a family is a group of its own.

    Raises:
        SelectionError: for anything but lists of names, or a family of which the names have fewer than two parts.

    >>> groups_of(["0.q_proj.weight", "0.k_proj.weight", "1.q_proj.weight", "head"], None)
    [['0.q_proj.weight', '0.k_proj.weight'], ['1.q_proj.weight'], ['head']]
    """
    families = SAME_INPUT if together is None else _checked(together)
    family_of = {part: number for number, family in enumerate(families) for part in family}
    groups: dict[tuple[str | int, ...], list[str]] = {}
    for name in names:
        groups.setdefault(tuple(family_of.get(part, part) for part in name.split(".")), []).append(name)
    if together is not None:
        _check_used(families, [part for group in groups.values() for name in group for part in name.split(".")])
    return list(groups.values())


def _checked(together: Any) -> list[list[str]]:
    if not _is_list(together) or not all(_is_list(f) and all(isinstance(part, str) for part in f) for f in together):
        raise SelectionError(
            f"together must be a list of lists of parts of names, such as [['q_proj', 'k_proj', 'v_proj']], not "
            f"{together!r}"
        )
    return [list(family) for family in together]


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _check_used(families: Sequence[Sequence[str]], parts: Iterable[str]) -> None:
    known = set(parts)
    for family in families:
        if missing := [part for part in family if part not in known]:
            raise SelectionError(f"together: no weight has {' or '.join(map(repr, missing))} in its name")
