"""Giving memory back that the C library keeps."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

#: Bytes of holes that are left as they are: what is made next fits into them, and finds them in memory.
_HOLES = 32 << 20


class _Heap(ctypes.Structure):
    """What glibc's `mallinfo2` says, in bytes: `fordblks` are free, `keepcost` of them at the end of the heap."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    )  # fmt: skip


def trim(holes: int = _HOLES) -> None:
    """Return the holes in the C library's heap to the system if they are more than so many bytes, where it is glibc.

    What was only needed meanwhile leaves holes between what stays. Those of a layer have almost the size of its scales,
    and some object of a few bytes in one keeps the next layer's scales out of it. Returned after every layer, they
    would have to be zeroed by the system for every layer again, which takes as long as quantizing it.
    """
    library = _glibc()
    if library is None:
        return
    heap = library.mallinfo2()
    if heap.fordblks - heap.keepcost > holes:
        library.malloc_trim(ctypes.c_size_t(heap.keepcost))


@cache
def _glibc() -> Any:
    """The C library, if it is one that tells of its holes and returns them; None otherwise."""
    try:
        library = ctypes.CDLL(None)
        library.mallinfo2.restype = _Heap
        return library if hasattr(library, "malloc_trim") else None
    except (OSError, TypeError, AttributeError):  # no C library by no name, as on Windows, or another one
        return None
