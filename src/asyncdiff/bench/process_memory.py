"""The memory of processes, from outside: now, and the most there ever was."""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import psutil

_INTERVAL_S = 0.01


@dataclass(frozen=True)
class ProcessMemory:
    """Bytes of one process. `resident`: all pages in memory, those of mapped files (libraries, safetensors)
    too, which the system may drop; `private`: without them, what nobody else can give back.
    """

    resident: int
    private: int

    def most(self, other: ProcessMemory) -> ProcessMemory:
        """The larger of each."""
        return ProcessMemory(max(self.resident, other.resident), max(self.private, other.private))

    def to_json(self) -> dict[str, int]:
        return asdict(self)


def memory_now(pid: int) -> ProcessMemory:
    """What the process has in memory; `psutil.NoSuchProcess` if it has ended."""
    status = _linux_status(pid)
    if status:
        return ProcessMemory(status["VmRSS"], status["RssAnon"] + status["RssShmem"])
    memory = psutil.Process(pid).memory_info()
    return ProcessMemory(memory.rss, memory.rss - getattr(memory, "shared", 0))


class MemoryWatch:
    """Samples a process and its descendants while it is open; `peaks` by process id.

    On Linux the resident peak is the kernel's own, which no sample misses; the private one is the largest of
    the samples, a hundred a second.
    """

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-watch", daemon=True)
        self.peaks: dict[int, ProcessMemory] = {}

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def sample(self) -> None:
        """Look once."""
        with suppress(psutil.NoSuchProcess):
            for process in (self._root, *self._root.children(recursive=True)):
                with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    now = memory_now(process.pid)
                    now = now.most(ProcessMemory(_linux_status(process.pid).get("VmHWM", 0), 0))
                    self.peaks[process.pid] = now.most(self.peaks.get(process.pid, now))

    def _run(self) -> None:
        while not self._stop.wait(_INTERVAL_S):
            self.sample()


def _linux_status(pid: int) -> dict[str, int]:
    """The sizes in `/proc/PID/status` in bytes; empty where there are none."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except FileNotFoundError:
        return {}
    fields = (line.split() for line in text.splitlines())
    sizes = {field[0].rstrip(":"): 1024 * int(field[1]) for field in fields if field[-1:] == ["kB"]}
    return sizes if "RssAnon" in sizes else {}
