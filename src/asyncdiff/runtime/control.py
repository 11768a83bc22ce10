"""Control connections: one authenticated socket per worker, apart from the tensors.

Messages are pickled dataclasses (`asyncdiff.protocol`). The driver reads each connection in a thread, so a dead or
failing worker is noticed while the main thread waits for tensors; the worker answers pings from a thread, so a
stopped one is told from a busy one.
"""

from __future__ import annotations

import pickle
import queue
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

from asyncdiff.errors import WorkerError
from asyncdiff.protocol.messages import Failure, Farewell, Ping, Pong, Reply, WorkerHello

PING_AFTER_S = 2.0
"""How long the driver waits for a worker before it asks whether it is alive."""

STALLED_AFTER_S = 6.0
"""How long a ping may stay unanswered before the worker counts as stalled."""


def send_message(connection: Connection, message: object) -> None:
    """Pickle and send. Plain pickle: multiprocessing's own would share CPU tensors by file descriptor."""
    connection.send_bytes(pickle.dumps(message, protocol=5))


def receive_message(connection: Connection) -> Any:
    """The next message; EOFError or OSError when the other side is gone."""
    return pickle.loads(connection.recv_bytes())


class WorkerConnection:
    """The driver's end of one worker's control connection. `rank` is the worker's global rank."""

    def __init__(self, connection: Connection, hello: WorkerHello) -> None:
        self.rank = hello.rank
        self.pid = hello.pid
        self.host = hello.host
        self.device = hello.device
        self._connection = connection
        self._send_lock = threading.Lock()
        self._replies: dict[int, queue.SimpleQueue[Any]] = {}
        self._failures: dict[int, Failure] = {}
        self._gone = threading.Event()
        self._ping_number = 0
        self._ping_sent_s: float | None = None
        self.clock_offset_s = 0.0
        threading.Thread(target=self._read, name=f"asyncdiff-control-{self.rank}", daemon=True).start()

    @property
    def is_gone(self) -> bool:
        """Whether the worker's end has closed."""
        return self._gone.is_set()

    def send(self, message: object) -> None:
        """Send a message; `WorkerError` if the worker is gone."""
        try:
            with self._send_lock:
                send_message(self._connection, message)
        except OSError as error:
            self._gone.set()
            raise self.death() from error

    def open_session(self, session: int) -> None:
        self._replies[session] = queue.SimpleQueue()

    def reply(self, session: int, operation: str) -> Any:
        """Wait for the answer to the session's last request; `WorkerError` if the worker fails, dies or stalls."""
        started = time.monotonic()
        while True:
            try:
                return self._replies[session].get(timeout=0.1)
            except queue.Empty:
                self.check(session, waited_s=time.monotonic() - started, operation=operation)

    def check(self, session: int, *, waited_s: float, operation: str) -> None:
        """Raise `WorkerError` if the worker has failed in this session, is gone, or does not answer pings."""
        if session in self._failures:
            raise self.failure_error(session)
        if self.is_gone:
            raise self.death(operation)
        if waited_s < PING_AFTER_S:
            self._ping_sent_s = None
        elif self._ping_sent_s is None:
            self._ping()
        elif time.monotonic() - self._ping_sent_s > STALLED_AFTER_S:
            raise WorkerError(
                f"Worker rank {self.rank} (process {self.pid} on {self.host}) has not answered for "
                f"{STALLED_AFTER_S:.0f} s while the driver waited for it ({operation}): it is stopped or hangs.",
                rank=self.rank,
                operation=operation,
            )

    def failed_run(self, session: int) -> int | None:
        """The run whose round failed on this worker, if one did since the last `clear_failure`."""
        failure = self._failures.get(session)
        return failure.run if failure else None

    def clear_failure(self, session: int) -> None:
        self._failures.pop(session, None)

    def failure_error(self, session: int) -> WorkerError:
        """The error to raise for the failure that the worker reported."""
        failure = self._failures[session]
        at_step = "" if failure.step is None else f" at step {failure.step}"
        of_stage = "" if failure.stage is None else f" of stage {failure.stage}"
        error = WorkerError(
            f"Worker rank {self.rank}{of_stage} failed{at_step} in {failure.operation}: {failure.message}",
            rank=self.rank,
            stage=failure.stage,
            step=failure.step,
            operation=failure.operation,
        )
        error.add_note(f"Traceback of worker rank {self.rank}:\n{failure.details}")
        return error

    def death(self, operation: str | None = None) -> WorkerError:
        """The error to raise when the worker is gone."""
        during = f" ({operation})" if operation else ""
        return WorkerError(
            f"Worker rank {self.rank} (process {self.pid} on {self.host}) ended unexpectedly{during}. Call "
            f"handle.remove() to get back what the other workers hold, then parallelize again.",
            rank=self.rank,
            operation=operation,
        )

    def farewell(self) -> None:
        """Tell the worker to end, and close."""
        if not self.is_gone:
            try:
                with self._send_lock:
                    send_message(self._connection, Farewell())
            except OSError:
                pass  # it ended first
        self.close()

    def close(self) -> None:
        self._gone.set()
        self._connection.close()

    def measure_clock(self) -> None:
        """Estimate the worker's `time.perf_counter()` minus ours, for traces that show several processes."""
        self._ping()

    def _ping(self) -> None:
        self._ping_number += 1
        self._ping_sent_s = time.monotonic()
        self._ping_clock_s = time.perf_counter()
        self.send(Ping(self._ping_number))

    def _read(self) -> None:
        try:
            while True:
                self._take(receive_message(self._connection))
        except (EOFError, OSError, TypeError):  # TypeError: closed by us while waiting
            self._gone.set()

    def _take(self, message: Any) -> None:
        if isinstance(message, Pong):
            if message.number == self._ping_number:
                middle = (self._ping_clock_s + time.perf_counter()) / 2
                self.clock_offset_s = message.clock_s - middle
                self._ping_sent_s = None
        elif isinstance(message, Failure):
            self._failures[message.session] = message
        elif isinstance(message, Reply) and message.session in self._replies:
            self._replies[message.session].put(message.payload)
