"""Word the progress of an activity: as a line of a log, and as a bar of a given width."""

from __future__ import annotations

import math

from rich.text import Text

from fewbits._table import elide, printable
from fewbits.cli.meter import Reading

#: The most characters of a tensor's name in a line of a log.
NAME_WIDTH = 120

_SIZES = (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3), ("B", 1))
_LEAST_BAR, _WIDEST_BAR, _LEAST_NAME = 8, 30, 10


def log_line(reading: Reading) -> str:
    """Return one line, such as ``convert 37 %, 2.1 of 5.6 GB, 310 MB/s, 11 s left, lm_head.weight``."""
    head = f"{reading.activity} {_percent(reading)}"
    parts = (head, _amount(reading), _rate(reading), _left(reading), elide(printable(reading.name), NAME_WIDTH))
    return ", ".join(filter(None, parts))


def bar_line(reading: Reading, width: int, *, ascii_only: bool = False) -> Text:
    """Lay out a reading in at most `width` characters. The least important parts give way first.

    Args:
        reading: the progress to show.
        width: the width of the terminal, in columns.
        ascii_only: draw the bar with ASCII characters.
    """
    head = f"{reading.activity} {_percent(reading):>5}"[:width]
    room = width - len(head)
    facts = [_gap(fact(reading)) for fact in (_amount, _rate, _left)]
    for least in (1, 0, 2):
        if sum(map(len, facts)) > room:
            facts[least] = ""
    room -= sum(map(len, facts))
    line = Text(head, no_wrap=True, overflow="crop")  # a character of a name may take two columns
    length = min(_WIDEST_BAR, max(_LEAST_BAR, width // 10))
    if length + 2 <= room:
        full, empty = "#." if ascii_only else "━─"
        done = length * reading.done // max(reading.total, 1)
        line.append("  ").append(full * done, "bar.complete").append(empty * (length - done), "bar.back")
        room -= length + 2
    line.append("".join(facts))
    return line.append(_gap(elide(printable(reading.name), room - 2))) if room - 2 >= _LEAST_NAME else line


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


def _gap(part: str) -> str:
    """Put a gap before a part of a line, unless the part is empty."""
    return part and f"  {part}"


def _percent(reading: Reading) -> str:
    """Round down, so that 100 % means finished."""
    return f"{100 if reading.is_finished else 100 * reading.done // reading.total} %"


def _amount(reading: Reading) -> str:
    if reading.unit != "bytes":
        return f"{reading.done:,} of {reading.total:,} {reading.unit}"
    name, size = _size(reading.total)
    digits = 0 if size == 1 or reading.total >= 100 * size else 1
    return f"{reading.done / size:.{digits}f} of {reading.total / size:.{digits}f} {name}"


def _rate(reading: Reading) -> str:
    if reading.rate is None:
        return ""
    if reading.unit != "bytes":
        return f"{reading.rate:.{1 if reading.rate < 10 else 0}f} {reading.unit}/s"
    name, size = _size(reading.rate)
    value = reading.rate / size
    return f"{value:.{1 if value < 10 else 0}f} {name}/s"


def _left(reading: Reading) -> str:
    """Return an empty string at the end, or while the time is unknown."""
    return f"{duration(reading.seconds_left)} left" if reading.seconds_left else ""


def _size(count: float) -> tuple[str, int]:
    """Choose the unit for a number of bytes."""
    return next((unit for unit in _SIZES if count >= unit[1]), _SIZES[-1])
