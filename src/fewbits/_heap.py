"""Return memory to the system: freed memory of the C library, and pages of mapped files."""

from __future__ import annotations

import ctypes
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

#: Holes up to this many bytes are not returned: the next tensors reuse them without new pages from the system.
_HOLES = 32 << 20

#: Advice of Linux 5.4 and later to reclaim pages. Unlike others, it keeps the contents of pages that were written to.
_PAGE_OUT = 21


class _Heap(ctypes.Structure):
    """The result of glibc's `mallinfo2`, in bytes: `fordblks` are free, `keepcost` of them at the end of the heap."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    )  # fmt: skip


def trim(holes: int = _HOLES) -> None:
    """Return the holes in glibc's heap to the system if they exceed `holes` bytes; do nothing for another C library.

    Intermediate results leave holes between the results that stay. The holes of a layer are about as large as its
    scales, but a small object in a hole keeps the next layer's scales out of it. Holes are not returned after every
    layer, because the system would then zero new pages for every layer, which takes as long as quantizing it.
    """
    library = _glibc()
    if library is None:
        return
    heap = library.mallinfo2()
    if heap.fordblks - heap.keepcost > holes:
        library.malloc_trim(ctypes.c_size_t(heap.keepcost))


@cache
def _glibc() -> Any:
    """Return the C library if it has `mallinfo2` and `malloc_trim`; None otherwise."""
    try:
        library = ctypes.CDLL(None)
        library.mallinfo2.restype = _Heap
        return library if hasattr(library, "malloc_trim") else None
    except (OSError, TypeError, AttributeError):  # Windows, or another C library than glibc
        return None


def page_out(files: Collection[str]) -> None:
    """Release the memory of files that are mapped into this process; the next access reads the file again.

    It does nothing where there is no ``/proc/self/maps``, or where the system is older than Linux 5.4.
    """
    try:
        maps = Path("/proc/self/maps").read_text().splitlines()
        advise = ctypes.CDLL(None).madvise
    except (OSError, TypeError, AttributeError):  # not Linux
        return
    for line in maps:
        span, _, path = line.partition(" ")
        if path.rpartition(" ")[2] in files:
            start, stop = (int(address, 16) for address in span.split("-"))
            advise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _PAGE_OUT)
