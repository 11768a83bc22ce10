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
from asyncdiff.runtime.allocator import keep_freed_memory, return_freed_memory

torch.set_num_threads(1)
keep_freed_memory()
pages = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
forward = lambda: [torch.ones(1 << 20) + 1 for _ in range(8)]
for _ in range(3):
    forward()
before = pages()
for _ in range(20):
    forward()
faults = pages() - before
held = psutil.Process().memory_info().rss
return_freed_memory()
print(faults, held - psutil.Process().memory_info().rss)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc only")
def test_memory_that_is_freed_is_used_again_until_it_is_returned() -> None:
    run = subprocess.run(
        [sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=True, timeout=120
    )
    faults, returned = map(int, run.stdout.split())
    pages_of_a_forward = 8 * (4 << 20) // mmap.PAGESIZE
    assert faults < 2 * pages_of_a_forward, "of twenty forwards"
    assert returned > 16 << 20, "32 MB were free"
