"""The C library's memory in a CPU worker: kept when it is freed, as CUDA's caching allocator keeps a GPU's.

glibc returns the memory of large tensors to the system and gets it back with the next forward, page by page.
In a worker that runs the same forward again and again that is 5 to 10 % of the time.
"""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 1 << 25  # glibc takes no more
_NEVER_TRIM = (1 << 31) - 1


def keep_freed_memory() -> None:
    """From now on, memory that this process frees stays with it. Nothing happens without glibc."""
    if _has_glibc():
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        library.mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIM)


def return_freed_memory() -> None:
    """Give back to the system what is free now."""
    if _has_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def _has_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"
