"""How far an activity is, in words: for a line in a log, and for a bar of a given width."""

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
    """One line without an end, such as ``convert 37 %, 2.1 of 5.6 GB, 310 MB/s, 11 s left, lm_head.weight``."""
    head = f"{reading.activity} {_percent(reading)}".rstrip()
    parts = (head, _amount(reading), _rate(reading), _left(reading), elide(printable(reading.name), NAME_WIDTH))
    return ", ".join(filter(None, parts))


class Line(NamedTuple):
    """A line with a bar in it; the bar may have no width."""

    before: str
    bar_done: str
    bar_rest: str
    after: str


def bar_line(reading: Reading, width: int, *, ascii_only: bool = False) -> Line:
    """A line of at most `width` characters: as much as fits, and what matters most first.

    Args:
        reading: what it tells.
        width: of the terminal, in columns.
        ascii_only: draw with what every encoding has.
    """
    before = f"{reading.activity} {_percent(reading):>5}".rstrip()[:width]
    left, amount, rate = _fitting((_left(reading), _amount(reading), _rate(reading)), width - len(before))
    facts = amount + rate + left
    room = width - len(before) - len(facts)
    done, rest = _bar(reading, width, room - 2, "#." if ascii_only else "━─")
    gap = "  " if done or rest else ""
    room -= len(gap) + len(done) + len(rest)
    name = f"  {elide(printable(reading.name), room - 2)}" if room - 2 >= _LEAST_NAME else ""
    return Line(before + gap, done, rest, facts + name)


def printable(name: str) -> str:
    """A name with escapes in place of what would move the cursor, end the line, or cannot be encoded."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in name)


def duration(seconds: float) -> str:
    """Seconds as people say them: ``11 s``, ``4 min 05 s``, ``12 min``, ``2 h 40 min``, ``3 d 4 h``."""
    whole = math.ceil(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60:02} min"
    if minutes >= 10:
        return f"{minutes} min"
    return f"{minutes} min {whole % 60:02} s" if minutes else f"{whole} s"


def _fitting(parts: Sequence[str], room: int) -> Iterator[str]:
    """Each part with a gap before it, or nothing in place of one that does not fit beside those before it."""
    for part in parts:
        fitting = f"  {part}" if part and len(part) + 2 <= room else ""
        room -= len(fitting)
        yield fitting


def _bar(reading: Reading, width: int, room: int, characters: str) -> tuple[str, str]:
    """The two parts of the bar, as long as becomes a line of that width; none if there is no room, or no total."""
    length = min(_WIDEST_BAR, max(_LEAST_BAR, width // 10))
    if not reading.total or length > room:
        return "", ""
    done = length * reading.done // reading.total
    return characters[0] * done, characters[1] * (length - done)


def _percent(reading: Reading) -> str:
    """Rounded down: 100 % means all."""
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
    """Nothing when there is nothing left."""
    return f"{duration(reading.seconds_left)} left" if reading.seconds_left else ""


def _size(count: float) -> tuple[str, int]:
    """The unit for so many bytes, and its size."""
    return next((unit for unit in _SIZES if count >= unit[1]), _SIZES[-1])
