"""Fenced code blocks of Markdown documents."""

import re
import textwrap
from collections.abc import Iterator
from typing import NamedTuple

FENCE = re.compile(r"\s*(?P<ticks>`{3,}|~{3,})\s*(?P<language>[^`\s]*)")


class Block(NamedTuple):
    """A fenced block: `line` is the number of the first line inside the fence."""

    language: str
    line: int
    source: str


def blocks(text: str) -> Iterator[Block]:
    """The fenced blocks of a Markdown text, in order."""
    opened, start, body = None, 0, []
    for number, line in enumerate(text.splitlines(), 1):
        if opened is None:
            opened = FENCE.match(line)
            start, body = number + 1, []
        elif line.strip() == opened["ticks"]:
            yield Block(opened["language"], start, textwrap.dedent("\n".join(body)))
            opened = None
        else:
            body.append(line)
    if opened is not None:
        raise ValueError(f"the fence opened on line {start - 1} is never closed")
