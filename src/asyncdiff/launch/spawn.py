"""Starting worker processes on this host: `python -m asyncdiff.worker`, one per further device.

Each in a session of its own (Ctrl-C reaches only the driver). The user's `__main__` is never imported, so
scripts without a guard, `python -`, notebooks and server threads work. A worker ends when its control
connection closes.
"""

from __future__ import annotations

import atexit
import json
import os
import secrets
import subprocess
import sys
import time
import weakref
from multiprocessing import AuthenticationError
from multiprocessing.connection import Listener
from pathlib import Path

import asyncdiff
from asyncdiff.errors import WorkerError
from asyncdiff.runtime.control import WorkerConnection, receive_message
from asyncdiff.runtime.remote import WorkerUsers

_START_TIMEOUT_S = 120.0
_END_TIMEOUT_S = 5.0


class SpawnedWorkers:
    """Worker processes of one handle, ranks 1 to `num_workers` (the driver is rank 0)."""

    is_local = True

    def __init__(self, threads: list[int | None]) -> None:
        """Start one process per entry; `threads[i]` is its number of intra-op threads (None: torch's
        default).
        """
        self.connections: dict[int, WorkerConnection] = {}
        self.users = WorkerUsers()
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self.driver_pid = os.getpid()
        authkey = secrets.token_bytes(32)
        with Listener(("127.0.0.1", 0), backlog=len(threads), authkey=authkey) as listener:
            try:
                for rank, count in enumerate(threads, start=1):
                    self._processes[rank] = _start_process(rank, listener.address, authkey, count)
                self._accept_all(listener)
            except BaseException:
                self.close()
                raise
        _LIVE.add(self)

    def kill(self, rank: int) -> None:
        """End a stalled worker at once, so that its peers' transfers fail instead of waiting."""
        self._processes[rank].kill()
        self._processes[rank].wait(_END_TIMEOUT_S)

    def close(self) -> None:
        """End the workers: politely first, then not. Safe to call twice."""
        for connection in self.connections.values():
            connection.farewell()
        deadline = time.monotonic() + _END_TIMEOUT_S
        for process in self._processes.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(_END_TIMEOUT_S)
        self.connections, self._processes = {}, {}
        _LIVE.discard(self)

    def _accept_all(self, listener: Listener) -> None:
        """Wait for every process to connect, watching for one that ends before it does."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        socket = listener._listener._socket  # type: ignore[attr-defined]
        socket.settimeout(0.2)
        while len(self.connections) < len(self._processes):
            try:
                connection = listener.accept()
                hello = receive_message(connection)
            except (TimeoutError, EOFError, ConnectionError, AuthenticationError):
                # Nobody yet, or not one of ours.
                self._check_started(deadline)
                continue
            self.connections[hello.rank] = WorkerConnection(connection, hello)

    def _check_started(self, deadline: float) -> None:
        for rank, process in self._processes.items():
            if process.poll() is not None and rank not in self.connections:
                raise WorkerError(
                    f"Worker rank {rank} ended with exit code {process.returncode} while starting.", rank=rank
                )
        if time.monotonic() > deadline:
            late = min(set(self._processes) - set(self.connections))
            raise WorkerError(f"Worker rank {late} did not start within {_START_TIMEOUT_S:.0f} s.", rank=late)


_LIVE: weakref.WeakSet[SpawnedWorkers] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for workers in list(_LIVE):
        if workers.driver_pid == os.getpid():  # not in a forked child of the driver
            workers.close()


def _start_process(
    rank: int, address: tuple[str, int], authkey: bytes, threads: int | None
) -> subprocess.Popen[bytes]:
    """Address, key and import path go through standard input, where other users cannot see them."""
    environment = dict(os.environ)
    package_parent = str(Path(asyncdiff.__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package_parent, environment.get("PYTHONPATH")]))
    if threads is not None:
        environment["OMP_NUM_THREADS"] = environment["MKL_NUM_THREADS"] = str(threads)
    # -P: a module of the working directory must not be imported in the place of a standard one.
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "asyncdiff.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )
    bootstrap = {"rank": rank, "address": list(address), "authkey": authkey.hex(), "path": sys.path}
    assert process.stdin is not None
    process.stdin.write(json.dumps(bootstrap).encode())
    process.stdin.close()
    return process
