"""`LayerSelector`: gives every tensor exactly one fate, with a reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from fewbits.errors import SelectionError
from fewbits.selection.info import TensorInfo
from fewbits.selection.patterns import Pattern, Patterns, check_all_used, parse_patterns
from fewbits.selection.rules import (
    Override,
    OverrideRule,
    TypeRule,
    check_types,
    check_types_used,
    is_embedding,
    is_of_type,
    parse_override,
    parse_rule,
    type_name,
)


@attrs.frozen
class Decision:
    """Whether and how to quantize one tensor.

    Attributes:
        quantize: True to quantize the tensor, False to keep it.
        reason: the reason that the ledger shows.
        named: whether a user's rule names this tensor or its class.
        override: a spec that replaces the quantizer's own; None for the quantizer's own.
        input_axes: the axes of the tensor that are its inputs; None to derive them from its class or shape.
    """

    quantize: bool
    reason: str
    named: bool = False
    override: Override | None = None
    input_axes: tuple[int, ...] | None = None


class LayerSelector:
    """Decide which tensors are quantized: by name patterns, by types and by size.

    A subclass with another way to decide overrides `select`. The quantizer makes the ledger from the decisions.

    Rules take effect in this order: obstacles, `exclude`, `overrides`, `include`, `embeddings`, `min_elements`, the
    tensors that the scheme skips by default.

    Args:
        include: name patterns (see `fewbits.selection.patterns`) of tensors to quantize, even if they are small, or the
            scheme would skip them. If `include` or `include_types` is given, all other tensors are kept, except
            embeddings for which there is a rule.
        exclude: name patterns of tensors to keep.
        include_types: classes, or names of classes, whose tensors are included.
        exclude_types: classes, or names of classes, whose tensors are kept.
        modules_to_not_convert: the same as `exclude`, under the name that transformers uses.
        overrides: a mapping from name patterns to ``"keep"``, ``"quantize"`` with the quantizer's own spec, the short
            name of a scheme, a spec, or fields to change (``{"group_size": 64}``,
            ``{"scheme": "int4", "group_size": 32}``). Matching tensors are treated as if
            `include` named them. If several patterns match, the last one wins.
        embeddings: a rule as in `overrides`, such as ``"int8"``, for embeddings that no other rule names, and for an
            output layer that shares the weight of one; a rule that keeps this layer contradicts it. None leaves
            embeddings to the scheme; schemes of up to 4 bits keep them.
        input_axes: a mapping from name patterns to the axis or axes of a tensor that are its inputs. Groups and scales
            run along them. Use it for tensors whose class does not determine the axes.
        min_elements: tensors with fewer elements are kept; None means the scheme's limit, commonly 512.

    Raises:
        SelectionError: if a rule is malformed; from `select`, if a rule fits no tensor that can be quantized.
    """

    def __init__(
        self,
        *,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        include_types: Sequence[TypeRule] = (),
        exclude_types: Sequence[TypeRule] = (),
        modules_to_not_convert: Sequence[str] = (),
        overrides: Mapping[str, OverrideRule] | None = None,
        embeddings: OverrideRule | None = None,
        input_axes: Mapping[str, int | Sequence[int]] | None = None,
        min_elements: int | None = None,
    ) -> None:
        self._include = Patterns(parse_patterns("include", include))
        unconverted = parse_patterns("modules_to_not_convert", modules_to_not_convert)
        self._exclude = Patterns(parse_patterns("exclude", exclude) + unconverted)
        self._include_types = check_types("include_types", include_types)
        self._exclude_types = check_types("exclude_types", exclude_types)
        self._overrides = {
            Pattern(text): parse_override(text, rule) for text, rule in _mapping("overrides", overrides).items()
        }
        self._of_embeddings = None if embeddings is None else _decision_of_embeddings(embeddings)
        self._input_axes = {
            Pattern(text): _axes(text, axes) for text, axes in _mapping("input_axes", input_axes).items()
        }
        self._overriding, self._declaring = Patterns(self._overrides), Patterns(self._input_axes)
        if min_elements is not None and (type(min_elements) is not int or min_elements < 0):
            raise SelectionError(f"min_elements must be an integer from 0 up, or None, not {min_elements!r}")
        self._min_elements = min_elements

    def select(self, infos: Sequence[TensorInfo]) -> Sequence[Decision]:
        """One decision for every tensor, in the same order.

        A tensor with an `obstacle` cannot be quantized, whatever is decided here.

        Raises:
            SelectionError: if a rule fits no tensor.
        """
        names = [info.name for info in infos]
        rules = {
            "exclude": self._exclude,
            "include": self._include,
            "overrides": tuple(self._overrides),
            "input_axes": tuple(self._input_axes),
        }
        for rule, patterns in rules.items():
            check_all_used(patterns, names, rule)
        check_types_used(self._include_types, infos, "include_types")
        check_types_used(self._exclude_types, infos, "exclude_types")
        kept = {*self._exclude, *(pattern for pattern, override in self._overrides.items() if override is None)}
        for rule, patterns in rules.items():
            _check_quantizable([pattern for pattern in patterns if pattern not in kept], infos, rule)
        if self._of_embeddings is not None:
            _check_embeddings(infos, self._of_embeddings.quantize)
        return [self._decide(info) for info in infos]

    def _decide(self, info: TensorInfo) -> Decision:
        decision = self._fate(info)
        declaring = self._declaring.matching(info.name)
        return attrs.evolve(decision, input_axes=self._input_axes[declaring[-1]]) if declaring else decision

    def _fate(self, info: TensorInfo) -> Decision:
        excluded = _which(info, self._exclude, self._exclude_types)
        if excluded is not None:
            return Decision(False, f"excluded by {excluded}", named=True)
        overriding = self._overriding.matching(info.name)
        if overriding:
            override = self._overrides[overriding[-1]]
            return Decision(override is not None, f"override {overriding[-1].text!r}", named=True, override=override)
        included = _which(info, self._include, self._include_types)
        if included is not None:
            return Decision(True, f"included by {included}", named=True)
        if self._of_embeddings is not None and is_embedding(info):
            return self._of_embeddings
        if self._include or self._include_types:
            return Decision(False, "no include rule names it")
        least = info.min_elements if self._min_elements is None else self._min_elements
        if info.elements < least:
            return Decision(False, f"fewer than {least} elements")
        return Decision(False, info.skip) if info.skip is not None else Decision(True, "selected")


def _check_embeddings(infos: Sequence[TensorInfo], quantize: bool) -> None:
    """Refuse a rule for embeddings that has no effect.

    Raises:
        SelectionError: if there is no embedding, or none that can be quantized.
    """
    embeddings = [info for info in infos if is_embedding(info)]
    if not embeddings:
        raise SelectionError("embeddings: there is no embedding, neither by class nor by name")
    if quantize and all(info.obstacle is not None for info in embeddings):
        raise SelectionError(
            f"embeddings: no embedding can be quantized: {embeddings[0].name}, {embeddings[0].obstacle}"
        )


def _decision_of_embeddings(rule: OverrideRule) -> Decision:
    override = parse_rule("embeddings", rule)
    return Decision(override is not None, "rule for embeddings", named=True, override=override)


def _which(info: TensorInfo, patterns: Patterns, types: Sequence[TypeRule]) -> str | None:
    """Return the text of the rule that names the tensor; None if no rule does."""
    for pattern in patterns.matching(info.name):
        return repr(pattern.text)
    for rule in types:
        if is_of_type(info, rule):
            return f"type {type_name(rule)}"
    return None


def _mapping(rule: str, given: Mapping[str, Any] | None) -> Mapping[str, Any]:
    if given is not None and not isinstance(given, Mapping):
        raise SelectionError(f"{rule} must be a mapping from name patterns to settings, not {given!r}")
    return given or {}


def _axes(pattern: str, axes: int | Sequence[int]) -> tuple[int, ...]:
    found = (axes,) if isinstance(axes, int) else axes
    if not isinstance(found, Sequence) or not found or any(type(axis) is not int for axis in found):
        raise SelectionError(f"input_axes[{pattern!r}] must be an axis or a sequence of axes, not {axes!r}")
    return tuple(found)


def _check_quantizable(patterns: Sequence[Pattern], infos: Sequence[TensorInfo], rule: str) -> None:
    """Refuse patterns that name only tensors that cannot be quantized.

    Raises:
        SelectionError: if there are any; the message gives the reason for the first tensor that the pattern names.
    """
    known = Patterns(patterns)
    of_pattern: dict[Pattern, list[TensorInfo]] = {}
    for info in infos if known else ():
        for pattern in known.matching(info.name):
            of_pattern.setdefault(pattern, []).append(info)
    for pattern in known:
        named = of_pattern[pattern]
        if all(info.obstacle is not None for info in named):
            first = named[0]
            raise SelectionError(
                f"{rule}: {pattern.text!r} names nothing that can be quantized: {first.name}, {first.obstacle}"
            )
