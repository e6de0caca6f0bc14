"""Fit aligned text into a width: names lose parts in their middle, sentences break between words."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain

ELLIPSIS = "..."

#: The smallest widths of a name and of a text, even in a narrower terminal.
_LEAST_NAME, _LEAST_TEXT = 12, 20

#: Shorter names are hard to tell apart.
_READABLE_NAME = 24

Row = tuple[str, ...]


def render_table(rows: Sequence[Row], *, right: tuple[int, ...] = ()) -> str:
    """Align rows of equal length; the first row is the heading, the columns in `right` are flush right."""
    widths = _widths(rows)
    lines = [
        "  ".join(
            cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def wrap_last(rows: Sequence[Row], width: int) -> list[Row]:
    """Break the last column into lines, so that the table fits `width`."""
    room = max(width - _taken(rows, slice(None, -1)), _LEAST_TEXT)
    wrapped = []
    for *cells, text in rows:
        first, *more = wrap(text, room) or [""]
        wrapped += [(*cells, first), *(("",) * len(cells) + (line,) for line in more)]
    return wrapped


def elide_first(rows: Sequence[Row], width: int) -> list[Row]:
    """Shorten the names in the first column, so that the table fits `width`."""
    room = max(width - _taken(rows, slice(1, None)), _LEAST_NAME)
    names = elide_all([row[0] for row in rows], room)
    return [(name, *row[1:]) for name, row in zip(names, rows, strict=True)]


def render_fitting(whole: Sequence[Row], short: Sequence[Row], width: int | None, *, right: Sequence[str]) -> str:
    """Align the rows of `whole`; if they are wider than `width`, those of `short` with shortened names.

    Where names would become shorter than 24 characters, the second column is left out too.

    Args:
        whole: the rows, with the heading.
        short: the same rows with fewer columns.
        width: the largest line length; None means no limit.
        right: the headings of the columns that are flush right.
    """
    if width is not None and sum(_widths(whole)) + 2 * (len(whole[0]) - 1) > width:
        if width - _taken(short, slice(1, None)) < _READABLE_NAME:
            short = [(row[0], *row[2:]) for row in short]
        whole = elide_first(short, width)
    return render_table(whole, right=tuple(i for i, heading in enumerate(whole[0]) if heading in right))


def wrap(text: str, width: int, indent: str = "") -> list[str]:
    """Break a text into lines of at most `width` characters; a word longer than a line is shortened.

    Args:
        text: a sentence; any white space counts as one space.
        width: the largest length of a line.
        indent: the prefix of all lines but the first.
    """
    width = max(width, _LEAST_TEXT)
    words = " ".join(elide(word, width - len(indent)) for word in text.split())
    return textwrap.wrap(words, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def elide(name: str, width: int) -> str:
    """Shorten a dotted name to at most `width` characters by leaving out parts in its middle.

    No part is cut, unless the last one alone is too long.

    >>> elide("model.layers.0.mlp.up_proj.weight", 32)
    'model.layers.0...up_proj.weight'
    """
    return next(_elisions(name, width))


def elide_all(names: Sequence[str], width: int) -> list[str]:
    """Shorten names to at most `width` characters each; different names stay different if the width allows it.

    >>> elide_all(["blocks.0.attn.norm.weight", "blocks.0.mlp.norm.weight", "blocks.1.mlp.norm.weight"], 22)
    ['blocks.0.attn...weight', 'blocks.0.mlp...weight', 'blocks.1...norm.weight']
    """
    ways = {name: list(_elisions(name, width)) for name in names}
    meanings = Counter(short for several in ways.values() for short in several)
    shown, used = dict[str, str](), set(names)
    for name, several in ways.items():
        unambiguous = (short for short in several if meanings[short] == 1)
        free = (short for short in several if short not in used)
        shown[name] = next(chain(unambiguous, free, several))
        used.add(shown[name])
    return [shown[name] for name in names]


def printable(name: str) -> str:
    """Escape the characters of a name that move the cursor, end the line, or cannot be encoded."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in name)


def _elisions(name: str, width: int) -> Iterator[str]:
    """Yield all ways to show a name in `width` characters, the longest first."""
    if len(name) <= width:
        yield name
        return
    parts = name.split(".")
    shown = [_longest_head(parts, ELLIPSIS + ".".join(parts[-tail:]), width) for tail in range(1, len(parts))]
    fitting = sorted((short for short in shown if len(short) <= width), key=len, reverse=True)
    yield from fitting or [(ELLIPSIS + name[len(name) - max(width - len(ELLIPSIS), 0) :])[: max(width, 0)]]


def _longest_head(parts: Sequence[str], tail: str, width: int) -> str:
    """Join as many of the first parts as fit in front of the tail."""
    heads = accumulate(parts, "{}.{}".format)
    return max((head + tail for head in heads if len(head + tail) <= width), key=len, default=tail)


def _widths(rows: Sequence[Row]) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def _taken(rows: Sequence[Row], columns: slice) -> int:
    """Return how many characters of a line these columns take, each with its gap."""
    return sum(width + 2 for width in _widths(rows)[columns])
