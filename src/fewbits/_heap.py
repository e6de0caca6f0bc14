"""Giving memory back that the C library keeps."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any


def trim() -> None:
    """Return the free pages of the C library's heap to the system, where the C library is one that can (glibc).

    What was only needed meanwhile leaves holes between what stays; each layer's have almost the size of its scales, and
    some object of a few bytes in one keeps the next layer's scales out of it.
    """
    if (trims := _malloc_trim()) is not None:
        trims(0)


@cache
def _malloc_trim() -> Any:
    try:
        return getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # no C library that can be opened by no name, as on Windows
        return None
