"""Memory that the C heap keeps after it was freed."""

from __future__ import annotations

import ctypes

_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)


def trim_heap() -> None:
    """Give the heap's free pages back to the system; where the C library cannot (not glibc), nothing.

    Buffers of some megabytes that several threads allocate and free leave holes in the heap of each thread,
    and no thread uses the holes of another: placing a state leaves half of its size behind, each save some
    more. Takes about 10 ms for a gigabyte; other threads may go on.
    """
    if _malloc_trim is not None:
        _malloc_trim(0)
