"""Memory is seen where it is, and gone when it is freed."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from asyncdiff.bench.process_memory import MemoryWatch, ProcessMemory, memory_now

SIZE = 64 << 20
SLACK = 8 << 20


def test_peak_stays_when_memory_is_freed() -> None:
    before = memory_now(os.getpid())
    with MemoryWatch(os.getpid()) as watch:
        block = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block.write(b"\1" * SIZE)
        watch.sample()
        block.close()
        watch.sample()
    peak = watch.peaks[os.getpid()]
    assert peak.private > before.private + SIZE - SLACK
    assert peak.resident >= peak.private
    assert memory_now(os.getpid()).private < peak.private - SIZE + SLACK


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_pages_of_a_file_are_resident_but_not_private(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"\1" * SIZE)
    before = memory_now(os.getpid())
    with path.open("rb") as file, mmap.mmap(file.fileno(), SIZE, prot=mmap.PROT_READ) as mapped:
        for page in range(0, SIZE, mmap.PAGESIZE):
            mapped[page]
        now = memory_now(os.getpid())
    assert now.resident > before.resident + SIZE - SLACK
    assert now.private < before.private + SLACK


def test_most_is_the_larger_of_each() -> None:
    assert ProcessMemory(3, 1).most(ProcessMemory(2, 5)) == ProcessMemory(3, 5)
