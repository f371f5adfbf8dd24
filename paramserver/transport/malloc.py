"""Makes glibc keep freed memory in the process.

A round's tensors come and go in the same sizes. By default glibc returns freed memory to the
system, and gets it back page by page: that costs ten times as much as one pass over the memory.
Other allocators, macOS's among them, keep large blocks by themselves.
"""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""Of mallopt(3)."""
LARGEST_BLOCK = 32 * 2**20  # the most that glibc allows
NEVER = 2**31 - 1


def keep_freed() -> None:
    """Keep freed memory from now on, in this process. It never holds more than its peak."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return
    mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK)
    mallopt(M_TRIM_THRESHOLD, NEVER)
    mallopt(M_ARENA_MAX, 1)  # memory freed by one thread serves the others too
