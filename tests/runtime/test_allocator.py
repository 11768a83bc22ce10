"""Freed memory stays with a worker, until it is told otherwise."""

from __future__ import annotations

import mmap
import platform
import subprocess
import sys

import pytest

_SCRIPT = """
import resource
import psutil, torch
from asyncdiff.runtime.allocator import freed_memory_kept, keep_freed_memory, return_freed_memory

torch.set_num_threads(1)
pages = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
forward = lambda: [torch.ones(size) + 1 for size in (1 << 20, 1 << 20, 12 << 20)]


def faults():
    for _ in range(3):
        forward()
    before = pages()
    for _ in range(20):
        forward()
    return pages() - before


with freed_memory_kept():
    kept_for_a_while = faults()
not_kept = faults()
keep_freed_memory()
kept = faults()
held = psutil.Process().memory_info().rss
return_freed_memory()
print(kept_for_a_while, not_kept, kept, held - psutil.Process().memory_info().rss)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc only")
def test_memory_that_is_freed_is_used_again_until_it_is_returned() -> None:
    run = subprocess.run(
        [sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=True, timeout=120
    )
    kept_for_a_while, not_kept, kept, returned = map(int, run.stdout.split())
    pages_of_a_forward = (56 << 20) // mmap.PAGESIZE  # all are held at once, in the end
    assert kept_for_a_while < 2 * pages_of_a_forward, "of twenty forwards"
    assert kept < 2 * pages_of_a_forward
    assert not_kept > 10 * pages_of_a_forward
    assert returned > 32 << 20, "56 MB were free"
