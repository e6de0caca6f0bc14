"""What a config holds: values that never change, the checks they pass, and how they look in JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import attrs
import torch

from fewbits.errors import ArgumentError
from fewbits.numerics.dtypes import dtype_from_name, dtype_name
from fewbits.numerics.spec import Spec, spec_from_dict


@attrs.frozen(eq=False, repr=False)
class Table(Mapping[str, Any]):
    """A mapping that never changes, so that a config can be a key and be sent to another process."""

    _items: dict[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)


# Converters make what was given immutable; what they do not know they leave to the validators.


def frozen(value: Any) -> Any:
    """Lists as tuples and mappings as tables, all the way down."""
    if isinstance(value, Mapping):
        return Table({key: frozen(entry) for key, entry in value.items()})
    return tuple(map(frozen, value)) if isinstance(value, (list, tuple)) else value


def frozen_sequence(value: Any) -> Any:
    """What can be gone through as a tuple; one string or one class is no sequence."""
    single = isinstance(value, (str, bytes, type, Mapping))
    return tuple(value) if isinstance(value, Iterable) and not single else value


def frozen_overrides(value: Any) -> Any:
    """Rules by pattern: dtypes by name become dtypes, and what a spec's `to_dict` writes becomes the spec."""
    if not isinstance(value, Mapping):
        return value
    return Table({pattern: _frozen_override(pattern, rule) for pattern, rule in value.items()})


def _frozen_override(pattern: str, rule: Any) -> Any:
    if not isinstance(rule, Mapping):
        return rule
    try:
        if "kind" in rule:
            return spec_from_dict(dict(rule))
        dtype = rule.get("scale_dtype")
        return frozen(rule if dtype is None else {**rule, "scale_dtype": dtype_from_name(dtype_as_name(dtype))})
    except ArgumentError as error:
        raise ArgumentError(f"overrides[{pattern!r}]: {error}") from None


def dtype_as_name(value: Any) -> Any:
    """A dtype as its name."""
    return dtype_name(value) if isinstance(value, torch.dtype) else value


def in_order(table: Any) -> Any:
    """What tables are compared by: of overrides the last that matches wins, so their order counts."""
    return tuple(table.items())


def plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, Spec):
        return value.to_dict()
    return value.__name__ if isinstance(value, type) else dtype_as_name(value)


# Validators.


def must_be(allowed: str, holds: Callable[[Any], bool]) -> Callable[[Any, Any, Any], None]:
    """A validator that says what is allowed, unless `holds`."""

    def check(_: Any, field: Any, value: Any) -> None:
        if not holds(value):
            raise ArgumentError(f"{field.name} must be {allowed}, not {value!r}")

    return check


def one_of(*choices: Any) -> Callable[[Any, Any, Any], None]:
    """One of the choices, and of its very type: 1 is not True."""
    allowed = f"{', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}"
    return must_be(allowed, lambda value: any(type(value) is type(c) and value == c for c in choices))


def whole(least: int) -> Callable[[Any], bool]:
    """Whether a value is an integer, and not less."""
    return lambda value: type(value) is int and value >= least


def or_none(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """The same test, passed by None too."""
    return lambda value: value is None or holds(value)


def sequence_of(*kinds: type) -> Callable[[Any], bool]:
    """Whether a value is a sequence of nothing but these."""
    return lambda value: isinstance(value, tuple) and all(isinstance(entry, kinds) for entry in value)


def is_table(value: Any) -> bool:
    """Whether a value is, or came as, a mapping."""
    return isinstance(value, Table)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -math.inf < value < math.inf
