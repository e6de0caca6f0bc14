"""Values of a config: make them immutable, check them, and convert them to JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import attrs
import torch

from fewbits.errors import ArgumentError
from fewbits.numerics.dtypes import dtype_from_name, dtype_name
from fewbits.numerics.spec import Spec, spec_from_dict
from fewbits.quantizers.scheme import check_choice
from fewbits.selection.rules import place_of_override


@attrs.frozen(eq=False, repr=False)
class Table(Mapping[str, Any]):
    """An immutable mapping. It makes a config hashable and picklable."""

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


# Converters make arguments immutable. They return an unknown type unchanged, for the validators to refuse.


def frozen(value: Any) -> Any:
    """Convert nested lists to tuples, and nested mappings to tables."""
    if isinstance(value, Mapping):
        return Table({key: frozen(entry) for key, entry in value.items()})
    return tuple(map(frozen, value)) if isinstance(value, (list, tuple)) else value


def frozen_sequence(value: Any) -> Any:
    """Convert an iterable to a tuple; a string, a class or a mapping stays as it is."""
    single = isinstance(value, (str, bytes, type, Mapping))
    return tuple(value) if isinstance(value, Iterable) and not single else value


def frozen_overrides(value: Any) -> Any:
    """Convert rules: names of dtypes become dtypes, and tables from a spec's `to_dict` become specs."""
    if not isinstance(value, Mapping):
        return value
    return Table({pattern: _frozen_rule(place_of_override(pattern), rule) for pattern, rule in value.items()})


def frozen_embeddings(value: Any) -> Any:
    """Convert the rule for embeddings, as `frozen_overrides` converts each rule."""
    return _frozen_rule("embeddings", value)


def _frozen_rule(where: str, rule: Any) -> Any:
    if not isinstance(rule, Mapping):
        return rule
    try:
        if "kind" in rule:
            return spec_from_dict(dict(rule))
        dtype = rule.get("scale_dtype")
        return frozen(rule if dtype is None else {**rule, "scale_dtype": dtype_from_name(dtype_as_name(dtype))})
    except ArgumentError as error:
        raise ArgumentError(f"{where}: {error}") from None


def dtype_as_name(value: Any) -> Any:
    """Convert a dtype to its name."""
    return dtype_name(value) if isinstance(value, torch.dtype) else value


def in_order(table: Any) -> Any:
    """The items of a table, to compare with their order: the last override that matches wins."""
    return tuple(table.items())


def plain(value: Any) -> Any:
    """Convert a value for JSON."""
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, Spec):
        return value.to_dict()
    return value.__name__ if isinstance(value, type) else dtype_as_name(value)


# Fields, and tests of their values.


def setting(default: Any, allowed: str, holds: Callable[[Any], bool], **options: Any) -> Any:
    """Make a field that refuses a value, and names the allowed ones, unless `holds` is true."""

    def check(_: Any, field: Any, value: Any) -> None:
        if not holds(value):
            raise ArgumentError(f"{field.name} must be {allowed}, not {value!r}")

    return attrs.field(default=default, validator=check, **options)


def one_of(*choices: Any) -> Callable[[Any, Any, Any], None]:
    """Make a validator for a list of choices."""
    return lambda _, field, value: check_choice(field.name, value, choices)


def whole(least: int) -> Callable[[Any], bool]:
    """Make a test for integers from `least` up."""
    return lambda value: type(value) is int and value >= least


def or_none(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Make a test that None passes too."""
    return lambda value: value is None or holds(value)


def sequence_of(*kinds: type) -> Callable[[Any], bool]:
    """Make a test for sequences of these types."""
    return lambda value: isinstance(value, tuple) and all(isinstance(entry, kinds) for entry in value)


def is_table(value: Any) -> bool:
    """Whether a value is a `Table`: converters turn every mapping into one."""
    return isinstance(value, Table)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -math.inf < value < math.inf
