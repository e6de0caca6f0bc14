"""Parse and print numbers of bytes."""

from __future__ import annotations

import re
from fractions import Fraction

from fewbits.errors import ArgumentError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}

_SIZE = r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*(?:([kmgt]i?)?b)?\s*"


def parse_size(size: str | int, name: str) -> int:
    """Return the number of bytes given as an integer or as text such as ``"512MB"``, ``"1.5 GiB"`` or ``"5GB"``.

    Args:
        size: units such as GB are powers of 1000, units such as GiB powers of 1024.
        name: the name of the argument, for the error message.

    Raises:
        ArgumentError: if `size` is neither, or less than one byte.

    >>> parse_size("1.5 GiB", "size"), parse_size("512MB", "size"), parse_size(7, "size")
    (1610612736, 512000000, 7)
    """
    count = size if type(size) is int else 0
    if isinstance(size, str) and (found := re.fullmatch(_SIZE, size.lower())):
        count = int(Fraction(found[1]) * _UNITS[found[2] or ""])
    if count < 1:
        raise ArgumentError(
            f"{name} must be a number of bytes, at least one, or a text such as '512MB' or '1.5GiB', not {size!r}"
        )
    return count


def bytes_in_words(before: int, after: int) -> str:
    """Describe two sizes and their ratio.

    >>> bytes_in_words(4000, 1000)
    '4,000 -> 1,000 bytes (4.00x smaller)'
    >>> bytes_in_words(1000, 1250)
    '1,000 -> 1,250 bytes (1.25x larger)'
    """
    if not before or not after:
        return f"{before:,} -> {after:,} bytes"
    ratio = f"{before / after:.2f}x smaller" if after <= before else f"{after / before:.2f}x larger"
    return f"{before:,} -> {after:,} bytes ({ratio})"
