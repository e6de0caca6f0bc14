"""The parts of rules: classes or their names, and the spec that a rule asks for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs

from fewbits.errors import ArgumentError, SelectionError
from fewbits.numerics.dtypes import dtype_from_name
from fewbits.numerics.spec import SPECS, QuantSpec, Spec, spec_from_dict, spec_of_scheme
from fewbits.selection.info import TensorInfo
from fewbits.selection.nearest import checked_name, did_you_mean

#: A class or its name: ``nn.Embedding`` or ``"Embedding"``.
TypeRule = type | str

#: The value of a rule: a scheme's short name, ``"keep"``, ``"quantize"`` for the quantizer's own spec, a spec, or a
#: mapping of fields to change. The changes apply to the quantizer's own spec (``{"group_size": 64}``), or to the spec
#: of the ``"scheme"`` that the mapping names.
OverrideRule = str | Spec | Mapping[str, Any]


@attrs.frozen
class Override:
    """A different spec for the tensors that a rule names.

    Attributes:
        base: the spec to change; None means the quantizer's own spec.
        changes: fields of a `QuantSpec`, with their new values.
        where: the place of the rule, for messages, such as ``overrides['lm_head']``.
    """

    base: Spec | None
    changes: tuple[tuple[str, Any], ...] = ()
    where: str = attrs.field(default="", eq=False)

    def spec(self, own: Spec) -> Spec:
        """Return the spec of the override, for a quantizer with the spec `own`.

        Raises:
            SelectionError: if the changes do not fit the spec.
        """
        base, changes = self.base or own, dict(self.changes)
        if not changes:
            return base
        if not isinstance(base, QuantSpec):
            raise SelectionError(
                f"{self.where}: {sorted(changes)} cannot be changed in a cast to {base}; name a scheme with codes"
            )
        if changes.get("group_size") is not None:
            changes.setdefault("granularity", "group")
        try:
            return attrs.evolve(base, **changes)
        except ArgumentError as error:
            raise SelectionError(f"{self.where}: this does not fit {base}: {error}") from None


def parse_override(pattern: str, rule: OverrideRule) -> Override | None:
    """Parse one rule of `overrides`; see `parse_rule`."""
    return parse_rule(place_of_override(pattern), rule)


def place_of_override(pattern: str) -> str:
    """Name the place of a rule, for messages."""
    return f"overrides[{pattern!r}]"


def parse_rule(where: str, rule: OverrideRule) -> Override | None:
    """Parse a rule; return None if the rule is "keep".

    Raises:
        SelectionError: if the rule has the wrong type, or names an unknown scheme, field or dtype; the message begins
            with `where`. `Override.spec` checks the values of the fields.
    """
    try:
        return _parsed(where, rule)
    except ArgumentError as error:
        raise SelectionError(f"{where}: {error}") from None


def _parsed(where: str, rule: OverrideRule) -> Override | None:
    if isinstance(rule, str):
        return None if rule == "keep" else Override(None if rule == "quantize" else _named(rule), where=where)
    if isinstance(rule, Spec):
        return Override(rule, where=where)
    if not isinstance(rule, Mapping) or not rule:
        raise ArgumentError(
            "a rule must be a scheme's name, 'keep', 'quantize', a spec, or fields such as "
            f"{{'scheme': 'int4', 'group_size': 64}}, not {rule!r}"
        )
    if "kind" in rule:  # a whole spec, as `QuantSpec.to_dict` writes it
        return Override(spec_from_dict(dict(rule)), where=where)
    changes = {key: value for key, value in rule.items() if key != "scheme"}
    known = ["scheme", *attrs.fields_dict(QuantSpec)]
    for key in changes:
        if key not in known:
            raise ArgumentError(f"there is no field {key!r}{did_you_mean(key, known)}")
    if rule.get("scheme") in ("keep", "quantize"):
        raise ArgumentError(f"{rule['scheme']!r} takes no other settings; write {rule['scheme']!r} alone")
    base = _named(rule["scheme"]) if "scheme" in rule else None
    if isinstance(changes.get("scale_dtype"), str):
        changes["scale_dtype"] = dtype_from_name(changes["scale_dtype"])
    fields = tuple((key, tuple(value) if isinstance(value, list) else value) for key, value in sorted(changes.items()))
    return Override(base, fields, where)


def _named(scheme: object) -> Spec:
    return spec_of_scheme(checked_name("scheme", scheme, [*SPECS, "keep", "quantize"]))


def is_of_type(info: TensorInfo, rule: TypeRule) -> bool:
    """Tell whether the tensor's owner is that class or inherits from it; `rule` is the class or its name.

    Tensors whose name identifies an embedding count as embeddings; see `TensorInfo.is_embedding_by_name`.
    """
    if info.is_embedding_by_name and type_name(rule) == "Embedding":
        return True
    if info.owner is None:
        return False
    if isinstance(rule, str):
        return any(rule == base.__name__ for base in info.owner.__mro__)
    return issubclass(info.owner, rule)


def is_embedding(info: TensorInfo) -> bool:
    """Tell whether a tensor is the table of an embedding, by its class or by its name."""
    return is_of_type(info, "Embedding") or is_of_type(info, "EmbeddingBag")


def type_name(rule: TypeRule) -> str:
    """Return the name of a class that is given as a class or by name."""
    return rule if isinstance(rule, str) else rule.__name__


def check_types(rule: str, types: Sequence[TypeRule]) -> tuple[TypeRule, ...]:
    """Check that `types` is a sequence of classes or their names, and return it as a tuple.

    Raises:
        SelectionError: if it is not; the message names the rule and the value.
    """
    listed = tuple(types) if isinstance(types, Iterable) and not isinstance(types, (str, type)) else None
    if listed is None or not all(isinstance(entry, (str, type)) for entry in listed):
        hint = f": write [{type_name(types)}]" if isinstance(types, (str, type)) else f", not {types!r}"
        raise SelectionError(f"{rule} must be a sequence of classes or their names{hint}")
    return listed


def check_types_used(types: Sequence[TypeRule], infos: Sequence[TensorInfo], rule: str) -> None:
    """Refuse classes that own no tensor.

    Raises:
        SelectionError: if there are any; the message names them, and lists the source's classes.
    """
    unused = [type_name(t) for t in types if not any(is_of_type(info, t) for info in infos)]
    if unused:
        owners = sorted({info.owner.__name__ for info in infos if info.owner is not None})
        known = f"the classes here are {', '.join(owners)}" if owners else "a state dict or file has no classes"
        raise SelectionError(f"{rule}: no tensor belongs to {' or '.join(unused)}; {known}")
