"""Name patterns, which match whole dotted components.

``layers.1`` matches ``model.layers.1.mlp.weight`` and never ``layers.10``; ``gate`` never matches ``gate_proj``. Within
a component ``*`` matches any characters and ``?`` matches one. ``re:`` starts a regular expression that must match the
whole path of the module, or the whole name of the tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import attrs

from fewbits.errors import SelectionError
from fewbits.selection.nearest import advice, nearest


@attrs.frozen
class Pattern:
    """One name pattern.

    Raises:
        SelectionError: if the text is empty, has an empty component, or is not a valid regular expression.

    >>> Pattern("layers.1").matches("model.layers.1.mlp.weight"), Pattern("layers.1").matches("layers.10.weight")
    (True, False)
    >>> Pattern("*.down_proj").matches("mlp.down_proj.weight"), Pattern("re:lm_head").matches("lm_head.weight")
    (True, True)
    """

    text: str
    _regex: re.Pattern[str] = attrs.field(init=False, eq=False, repr=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "_regex", _compile(self.text))

    def matches(self, name: str) -> bool:
        """Tell whether the pattern matches the tensor with this full name, or a module that holds it."""
        if self.text.startswith("re:"):
            return any(self._regex.fullmatch(candidate) for candidate in (name, name.rpartition(".")[0]))
        return self._regex.search(f".{name}.") is not None


def _compile(text: object) -> re.Pattern[str]:
    if not isinstance(text, str):
        raise SelectionError(
            f"a name pattern must be a string, not {text!r}; pass classes as include_types or exclude_types"
        )
    if text.startswith("re:"):
        try:
            return re.compile(text[3:])
        except re.error as error:
            raise SelectionError(f"the pattern {text!r} is not a valid regular expression: {error}") from None
    components = text.split(".")
    if not all(components):
        raise SelectionError(f"the pattern {text!r} has an empty component; write it like 'layers.1' or '*.down_proj'")
    wild = {"*": "[^.]*", "?": "[^.]"}
    parts = ("".join(wild.get(char, re.escape(char)) for char in component) for component in components)
    return re.compile(r"\." + r"\.".join(parts) + r"(?=\.)")


def parse_patterns(rule: str, texts: Iterable[str]) -> tuple[Pattern, ...]:
    """Parse the patterns of one rule.

    Raises:
        SelectionError: if `texts` is a single string, which would give one pattern per letter.
    """
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise SelectionError(f"{rule} must be a sequence of patterns, such as ['lm_head'], not {texts!r}")
    return tuple(Pattern(text) for text in texts)


class Patterns(Sequence[Pattern]):
    """Patterns, and a quick way to find those that match a name.

    Patterns without wildcards are looked up by the runs of components of a name. Trying each of 10,000 patterns on each
    of 10,000 names takes minutes.

    Args:
        patterns: the patterns.
    """

    def __init__(self, patterns: Iterable[Pattern]) -> None:
        self._patterns = tuple(patterns)
        self._plain: dict[str, list[int]] = {}
        self._others = []
        for number, pattern in enumerate(self._patterns):
            if pattern.text.startswith("re:") or re.search(r"[*?]", pattern.text):
                self._others.append(number)
            else:
                self._plain.setdefault(pattern.text, []).append(number)

    def matching(self, name: str) -> list[Pattern]:
        """Return the patterns that match a name, in order."""
        parts = name.split(".") if self._plain else []
        runs = {".".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1)}
        found = [number for run in runs for number in self._plain.get(run, ())]
        found += [number for number in self._others if self._patterns[number].matches(name)]
        return [self._patterns[number] for number in sorted(found)]

    def __len__(self) -> int:
        return len(self._patterns)

    def __getitem__(self, index: Any) -> Any:
        return self._patterns[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Patterns) and self._patterns == other._patterns

    def __hash__(self) -> int:
        return hash(self._patterns)


def check_all_used(patterns: Iterable[Pattern], names: Sequence[str], rule: str) -> None:
    """Refuse patterns that match no name.

    Raises:
        SelectionError: if there are any; the message lists each unused pattern with the nearest names.
    """
    known = Patterns(patterns)
    used = {pattern for name in names for pattern in known.matching(name)} if known else ()
    unused = [pattern.text for pattern in known if pattern not in used]
    if unused:
        lines = (f"{text!r} matches nothing{_suggestion(text, names)}" for text in unused)
        raise SelectionError(f"{rule}: " + "; ".join(lines))


def _suggestion(text: str, names: Sequence[str]) -> str:
    """Suggest the nearest sequences of components, as long as the pattern."""
    text = text.removeprefix("re:")
    length = text.count(".") + 1
    runs: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        runs.update(dict.fromkeys(".".join(parts[i : i + length]) for i in range(len(parts) - length + 1)))
    # A component that continues the pattern is near, however long it is: `gate_proj` for `gate`.
    continued = [run for run in runs if run.startswith(text)]
    return advice(list(dict.fromkeys([*continued[:3], *nearest(text, runs, n=3)]))[:3])
