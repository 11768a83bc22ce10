"""What holds for every test: one thread, no network, no process left behind."""

from __future__ import annotations

import os

# Before torch is imported, here and in every process a test starts. Sums differ in the last bit between one
# and two threads, and the tests compare bitwise.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import signal
import sys
import time
import uuid
from collections.abc import Iterator

import hypothesis
import psutil
import pytest

_LEAVE_TIMEOUT_S = 5.0
# Whatever a test starts inherits it, so that also a process whose parent has died is found.
_MARK = "ASYNCDIFF_TEST_SESSION"
os.environ[_MARK] = uuid.uuid4().hex

# Shells let what they start in the background ignore Ctrl-C, and children inherit it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Two cores shared with whatever else runs: no deadline per example, and the same examples every time.
hypothesis.settings.register_profile("asyncdiff", deadline=None, derandomize=True)
hypothesis.settings.load_profile("asyncdiff")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    _set_one_thread()
    yield
    _set_one_thread()


@pytest.fixture(autouse=True)
def _no_process_left_behind() -> Iterator[None]:
    """Fail a test that leaves a process running; end the process, so that the next test starts clean."""
    before = _our_processes()
    yield
    left = _wait_until_gone(before)
    for process in left.values():
        process.kill()
    assert not left, f"left behind: {[_describe(process) for process in left.values()]}"


@pytest.fixture(autouse=True)
def _gpu_marker(request: pytest.FixtureRequest) -> None:
    marker = request.node.get_closest_marker("gpu")
    if marker is None:
        return
    import torch

    wanted = marker.kwargs.get("count", marker.args[0] if marker.args else 1)
    if torch.cuda.device_count() < wanted:
        pytest.skip(f"needs {wanted} CUDA device(s)")


def _set_one_thread() -> None:
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def _our_processes() -> dict[tuple[int, float], psutil.Process]:
    """Every process started by this test session, found by the mark in its environment."""
    found = {}
    for process in psutil.process_iter():
        try:
            ours = process.pid != os.getpid() and process.environ().get(_MARK) == os.environ[_MARK]
            # Python's own: lives until the session ends, however carefully shared memory is given back.
            if ours and "resource_tracker" not in " ".join(process.cmdline()):
                found[process.pid, process.create_time()] = process
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


def _wait_until_gone(
    before: dict[tuple[int, float], psutil.Process],
) -> dict[tuple[int, float], psutil.Process]:
    deadline = time.monotonic() + _LEAVE_TIMEOUT_S
    while True:
        left = {key: process for key, process in _our_processes().items() if key not in before}
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.05)


def _describe(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {' '.join(process.cmdline())}"
    except psutil.Error:
        return str(process.pid)
