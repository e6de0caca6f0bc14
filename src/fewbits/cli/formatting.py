"""Word the progress of an activity: as a line of a log, and as a bar of a given width."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from fewbits._table import elide
from fewbits.cli.meter import Reading

#: The most characters of a tensor's name in a line of a log.
NAME_WIDTH = 120

_SIZES = (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3), ("B", 1))
_LEAST_BAR, _WIDEST_BAR, _LEAST_NAME = 8, 30, 10


def log_line(reading: Reading) -> str:
    """Return one line, such as ``convert 37 %, 2.1 of 5.6 GB, 310 MB/s, 11 s left, lm_head.weight``."""
    head = f"{reading.activity} {_percent(reading)}".rstrip()
    parts = (head, _amount(reading), _rate(reading), _left(reading), elide(printable(reading.name), NAME_WIDTH))
    return ", ".join(filter(None, parts))


class Line(NamedTuple):
    """A line with a bar, which may be empty."""

    before: str
    bar_done: str
    bar_rest: str
    after: str


def bar_line(reading: Reading, width: int, *, ascii_only: bool = False) -> Line:
    """Lay out a reading in at most `width` characters. The least important parts give way first.

    Args:
        reading: the progress to show.
        width: of the terminal, in columns.
        ascii_only: draw the bar with ASCII characters.
    """
    before = f"{reading.activity} {_percent(reading):>5}".rstrip()[:width]
    left, amount, rate = _parts_that_fit((_left(reading), _amount(reading), _rate(reading)), width - len(before))
    facts = amount + rate + left
    room = width - len(before) - len(facts)
    done, rest = _bar(reading, width, room - 2, "#." if ascii_only else "━─")
    gap = "  " if done or rest else ""
    room -= len(gap) + len(done) + len(rest)
    name = f"  {elide(printable(reading.name), room - 2)}" if room - 2 >= _LEAST_NAME else ""
    return Line(before + gap, done, rest, facts + name)


def printable(name: str) -> str:
    """Escape the characters of a name that move the cursor, end the line, or cannot be encoded."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in name)


def duration(seconds: float) -> str:
    """Format seconds for people: ``11 s``, ``4 min 05 s``, ``12 min``, ``2 h 40 min``, ``3 d 4 h``."""
    whole = math.ceil(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60:02} min"
    if minutes >= 10:
        return f"{minutes} min"
    return f"{minutes} min {whole % 60:02} s" if minutes else f"{whole} s"


def _parts_that_fit(parts: Sequence[str], room: int) -> Iterator[str]:
    """Yield each part after a gap, or an empty string for a part that does not fit beside the earlier ones."""
    for part in parts:
        shown = f"  {part}" if part and len(part) + 2 <= room else ""
        room -= len(shown)
        yield shown


def _bar(reading: Reading, width: int, room: int, characters: str) -> tuple[str, str]:
    """Draw both parts of the bar; both are empty if there is no room, or no total."""
    length = min(_WIDEST_BAR, max(_LEAST_BAR, width // 10))
    if not reading.total or length > room:
        return "", ""
    done = length * reading.done // reading.total
    return characters[0] * done, characters[1] * (length - done)


def _percent(reading: Reading) -> str:
    """Round down, so that 100 % means finished."""
    return f"{100 * reading.done // reading.total} %" if reading.total else ""


def _amount(reading: Reading) -> str:
    if reading.unit != "bytes":
        of = f" of {reading.total}" if reading.total else ""
        return f"{reading.done}{of} {reading.unit}"
    name, size = _size(reading.total or reading.done)
    digits = 0 if size == 1 or reading.total >= 100 * size else 1
    of = f" of {reading.total / size:.{digits}f}" if reading.total else ""
    return f"{reading.done / size:.{digits}f}{of} {name}"


def _rate(reading: Reading) -> str:
    if reading.rate is None:
        return ""
    name, size = _size(reading.rate) if reading.unit == "bytes" else (reading.unit, 1)
    value = reading.rate / size
    return f"{value:.{1 if value < 10 else 0}f} {name}/s"


def _left(reading: Reading) -> str:
    """Return an empty string at the end, or while the time is unknown."""
    return f"{duration(reading.seconds_left)} left" if reading.seconds_left else ""


def _size(count: float) -> tuple[str, int]:
    """Choose the unit for a number of bytes."""
    return next((unit for unit in _SIZES if count >= unit[1]), _SIZES[-1])
