"""The C library's memory in a process that computes on the CPU: kept when it is freed, as CUDA's caching
allocator keeps a GPU's.

glibc returns the memory of large tensors to the system and gets it back with the next forward, page by page.
Where the same forward runs again and again that is 5 to 20 % of the time (a convolution in float32 lays out
its weights anew at every call, in memory of their size).
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER_TRIM = (1 << 31) - 1
_DEFAULT_TRIM_THRESHOLD, _DEFAULT_MMAP_MAX = 128 << 10, 1 << 16


def keep_freed_memory() -> None:
    """From now on, memory that this process frees stays with it. Nothing happens without glibc."""
    _set(_NEVER_TRIM, 0)  # what is mapped for itself would be unmapped when it is freed


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """`keep_freed_memory` for a while, in a process that goes on with other things."""
    keep_freed_memory()
    try:
        yield
    finally:
        _set(_DEFAULT_TRIM_THRESHOLD, _DEFAULT_MMAP_MAX)
        return_freed_memory()


def return_freed_memory() -> None:
    """Give back to the system what is free now."""
    if _has_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def _set(trim_threshold: int, mmap_max: int) -> None:
    if _has_glibc():
        library = ctypes.CDLL(None)
        library.mallopt(_M_TRIM_THRESHOLD, trim_threshold)
        library.mallopt(_M_MMAP_MAX, mmap_max)


def _has_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"
