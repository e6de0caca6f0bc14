"""`LayerSelector`: gives every tensor exactly one fate, with a reason."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import attrs

from fewbits.errors import SelectionError
from fewbits.selection.info import TensorInfo
from fewbits.selection.patterns import Pattern, check_all_used

#: A class, or the name of one: ``nn.Embedding`` or ``"Embedding"``.
TypeRule = type | str


@attrs.frozen
class Decision:
    """What shall become of one tensor.

    Attributes:
        quantize: whether the scheme is applied to it; otherwise it is kept.
        reason: why, in words for the ledger.
        named: whether a rule of the user's names this tensor or its class.
    """

    quantize: bool
    reason: str
    named: bool = False


class Selector(ABC):
    """Decides which tensors are quantized. The quantizer makes the ledger out of its decisions."""

    @abstractmethod
    def select(self, infos: Sequence[TensorInfo]) -> Sequence[Decision]:
        """One decision for every tensor, in the same order.

        A tensor with an `obstacle` cannot be quantized, whatever is decided here.

        Raises:
            SelectionError: if a rule fits no tensor.
        """


class LayerSelector(Selector):
    """Selects by name patterns and by types.

    What wins: an obstacle, then `exclude`, then `include`, then what the scheme skips by default.

    Args:
        include: name patterns (see `fewbits.selection.patterns`); if there are any rules to include, what none of
            them names is kept. A tensor that is named here is quantized even if the scheme skips its kind.
        exclude: name patterns of what is kept.
        include_types: classes, or names of classes, whose tensors are included.
        exclude_types: classes, or names of classes, whose tensors are kept.
        modules_to_not_convert: `exclude`, under the name that users of transformers know.

    Raises:
        SelectionError: here if a pattern is malformed, in `select` if a rule fits no tensor.
    """

    def __init__(
        self,
        *,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        include_types: Sequence[TypeRule] = (),
        exclude_types: Sequence[TypeRule] = (),
        modules_to_not_convert: Sequence[str] = (),
    ) -> None:
        self._include = _patterns("include", include)
        self._exclude = _patterns("exclude", exclude) + _patterns("modules_to_not_convert", modules_to_not_convert)
        self._include_types = check_types("include_types", include_types)
        self._exclude_types = check_types("exclude_types", exclude_types)

    def select(self, infos: Sequence[TensorInfo]) -> Sequence[Decision]:
        """One decision for every tensor, in the same order."""
        names = [info.name for info in infos]
        check_all_used(self._include, names, "include")
        check_all_used(self._exclude, names, "exclude")
        _check_types_used(self._include_types, infos, "include_types")
        _check_types_used(self._exclude_types, infos, "exclude_types")
        return [self._decide(info) for info in infos]

    def _decide(self, info: TensorInfo) -> Decision:
        excluded = _which(info, self._exclude, self._exclude_types)
        included = _which(info, self._include, self._include_types)
        if excluded is not None:
            return Decision(False, f"excluded by {excluded}", named=True)
        if included is not None:
            return Decision(True, f"included by {included}", named=True)
        if self._include or self._include_types:
            return Decision(False, "no include rule names it")
        if info.skip is not None:
            return Decision(False, info.skip)
        return Decision(True, "selected")


def is_of_type(info: TensorInfo, rule: TypeRule) -> bool:
    """Whether the tensor's owner is of that class, or of one with that name, or inherits from one."""
    if info.owner is None:
        return False
    if isinstance(rule, str):
        return any(rule == base.__name__ for base in info.owner.__mro__)
    return issubclass(info.owner, rule)


def type_name(rule: TypeRule) -> str:
    """The name of a class, given as itself or by name."""
    return rule if isinstance(rule, str) else rule.__name__


def _which(info: TensorInfo, patterns: Sequence[Pattern], types: Sequence[TypeRule]) -> str | None:
    """The rule that names the tensor, in words; None if none does."""
    for pattern in patterns:
        if pattern.matches(info.name):
            return repr(pattern.text)
    for rule in types:
        if is_of_type(info, rule):
            return f"type {type_name(rule)}"
    return None


def _patterns(rule: str, texts: Sequence[str]) -> tuple[Pattern, ...]:
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise SelectionError(f"{rule} is a sequence of patterns, such as ['lm_head'], not {texts!r}")
    return tuple(Pattern(text) for text in texts)


def check_types(rule: str, types: Sequence[TypeRule]) -> tuple[TypeRule, ...]:
    """A sequence of classes or their names, if it is one.

    Raises:
        SelectionError: naming the rule and what it was given.
    """
    if isinstance(types, (str, type)) or not isinstance(types, Iterable):
        hint = f": write [{type_name(types)}]" if isinstance(types, (str, type)) else f", not {types!r}"
        raise SelectionError(f"{rule} is a sequence of classes or their names{hint}")
    for entry in types:
        if not isinstance(entry, (str, type)):
            raise SelectionError(f"{rule} holds classes or their names, not {entry!r}")
    return tuple(types)


def _check_types_used(types: Sequence[TypeRule], infos: Sequence[TensorInfo], rule: str) -> None:
    unused = [type_name(t) for t in types if not any(is_of_type(info, t) for info in infos)]
    if unused:
        owners = sorted({info.owner.__name__ for info in infos if info.owner is not None})
        known = f"the classes here are {', '.join(owners)}" if owners else "a state dict or file knows no classes"
        raise SelectionError(f"{rule}: no tensor belongs to {' or '.join(unused)}; {known}")
