"""Control connections: one authenticated socket per worker, apart from the tensors.

Messages are pickled dataclasses (`asyncdiff.protocol`). The driver reads each connection in a thread, so a
dead or failing worker is noticed while the main thread waits for tensors; the worker answers pings from a
thread, so a stopped one is told from a busy one.
"""

from __future__ import annotations

import os
import pickle
import queue
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from asyncdiff.errors import WorkerError
from asyncdiff.protocol.messages import AbortRun, Failure, Farewell, Ping, Pong, Reply, WorkerHello
from asyncdiff.runtime.interrupts import interrupts_deferred

PING_AFTER_S = 2.0
"""How long the driver waits for a worker before it asks whether it is alive, and how often it asks then."""

STALLED_AFTER_S = 6.0
"""How long a ping may stay unanswered before the worker counts as stalled."""

_CHECK_INTERVAL_S = 0.1
_WAY_OUT = "Call handle.remove() to get back what the other workers hold, then parallelize again."
_SEND_TIMEOUT_S = 10


class WorkerLostError(WorkerError):
    """The worker is gone or does not answer, and with it what it held."""


@dataclass(frozen=True)
class Doing:
    """What the driver is waiting for, to be named when it does not come."""

    operation: str
    step: int | None = None


def send_message(connection: Connection, message: object) -> None:
    """Pickle and send. Plain pickle: multiprocessing's own would share CPU tensors by file descriptor."""
    connection.send_bytes(pickle.dumps(message, protocol=5))


def receive_message(connection: Connection) -> Any:
    """The next message; EOFError or OSError when the other side is gone."""
    return pickle.loads(connection.recv_bytes())


def send_at_once(connection: Connection) -> None:
    """Let messages leave while the one before has not been acknowledged, which the other end may put off for
    40 ms."""
    with socket.socket(fileno=os.dup(connection.fileno())) as duplicate:
        duplicate.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def socket_of(connection: Connection) -> socket.socket:
    """The connection's socket (a duplicate descriptor), with the options a control connection needs.

    Keep-alive notices that another machine has vanished. A send that blocks this long fails: the peer reads
    in a thread that does nothing else, so a full buffer means that it is stopped.
    """
    duplicate = socket.socket(fileno=os.dup(connection.fileno()))
    duplicate.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform != "win32":
        timeout = struct.pack("ll", _SEND_TIMEOUT_S, 0)
        duplicate.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
    if sys.platform == "linux":
        duplicate.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
        duplicate.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
        duplicate.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
    return duplicate


@dataclass
class _SessionState:
    """The driver's view of one session on one worker.

    Requests are answered in order, so the n-th answer belongs to the n-th request: an answer that nobody
    waited for (Ctrl-C, a failure elsewhere) is told from the one that is wanted. `runs`: those that are going
    on. `stage`: the one it holds.
    """

    answers: queue.SimpleQueue[tuple[int, Reply | Failure]] = field(default_factory=queue.SimpleQueue)
    num_requests: int = 0
    num_answers: int = 0
    runs: set[int] = field(default_factory=set)
    failure: Failure | None = None
    stage: int | None = None


class WorkerConnection:
    """The driver's end of one worker's control connection. `rank` is the worker's global rank."""

    def __init__(self, connection: Connection, hello: WorkerHello) -> None:
        self.rank = hello.rank
        self.pid = hello.pid
        self.host = hello.host
        self.device = hello.device
        self.clock_offset_s = 0.0
        self._connection = connection
        send_at_once(connection)
        self._socket = socket_of(connection)
        self._send_lock = threading.Lock()
        self._sessions: dict[int, _SessionState] = {}
        self._runs_lock = threading.Lock()
        self._gone = threading.Event()
        self._ping = _PingState()
        threading.Thread(target=self._read, name=f"asyncdiff-control-{self.rank}", daemon=True).start()

    @property
    def is_gone(self) -> bool:
        """Whether the worker's end has closed."""
        return self._gone.is_set()

    # -- messages --

    def send(self, message: object) -> None:
        """Send a message, whole even if Ctrl-C comes; `WorkerError` if the worker is gone."""
        try:
            with interrupts_deferred(), self._send_lock:
                send_message(self._connection, message)
        except OSError as error:
            self._gone.set()
            raise self.lost(None, Doing("sending a message")) from error

    def open_session(self, session: int) -> None:
        self._sessions[session] = _SessionState()

    def set_stage(self, session: int, stage: int) -> None:
        """Note which stage the worker holds, for errors."""
        self._sessions[session].stage = stage

    def close_session(self, session: int) -> None:
        self._sessions.pop(session, None)

    def request(self, session: int, message: object) -> int:
        """Send what the worker answers; the number of the request, for `reply`."""
        with interrupts_deferred():
            self._sessions[session].num_requests += 1
            self.send(message)
            return self._sessions[session].num_requests

    def reply(
        self, session: int, number: int, doing: Doing, *, meanwhile: Callable[[], None] = lambda: None
    ) -> Any:
        """Wait for the answer to a request, calling `meanwhile` now and then; `WorkerError` if the worker
        fails, dies or stalls.
        """
        started = time.monotonic()
        while True:
            try:
                answered, answer = self._sessions[session].answers.get(timeout=_CHECK_INTERVAL_S)
            except queue.Empty:
                meanwhile()
                self.check(session, waited_s=time.monotonic() - started, doing=doing)
                continue
            if answered == number:
                if isinstance(answer, Failure):
                    raise self.failure_error(answer)
                return answer.payload

    # -- runs --

    def begin_run(self, session: int, run: int) -> None:
        """From now on a failure in this run is ours to raise."""
        self._sessions[session].runs.add(run)

    def end_run(self, session: int, run: int) -> None:
        """The run is over: a failure in it, noticed or still to come, is answered with `AbortRun`."""
        with self._runs_lock:
            state = self._sessions[session]
            state.runs.discard(run)
            has_failed = state.failure is not None and state.failure.run == run
            if has_failed:
                state.failure = None
        if has_failed:
            with suppress(WorkerLostError):  # whoever asks it for something next is told
                self.send(AbortRun(session, run))

    def failure(self, session: int) -> Failure | None:
        """What failed in a run that is going on."""
        return self._sessions[session].failure

    # -- is it alive? --

    def check(self, session: int, *, waited_s: float, doing: Doing) -> None:
        """Raise `WorkerError` if a run that is going on failed, or the worker is gone or does not answer
        pings.
        """
        failure = self.failure(session)
        if failure is not None:
            raise self.failure_error(failure)
        if self.is_gone:
            raise self.lost(session, doing)
        if waited_s < PING_AFTER_S:
            return
        unheard_s = time.monotonic() - self._ping.sent_s
        if self._ping.is_answered and unheard_s > PING_AFTER_S:
            self.ping()
        elif not self._ping.is_answered and unheard_s > STALLED_AFTER_S:
            time.sleep(
                _CHECK_INTERVAL_S
            )  # if it was the driver that was stopped, the answer is there, unread
            if not self._ping.is_answered:
                raise self.lost(session, doing)

    def ping(self) -> None:
        """Ask for a sign of life, which also tells the worker's clock."""
        self._ping = _PingState(
            self._ping.number + 1, time.monotonic(), time.perf_counter(), is_answered=False
        )
        self.send(Ping(self._ping.number))

    # -- errors --

    def failure_error(self, failure: Failure) -> WorkerError:
        """The error to raise for a failure that the worker reported."""
        at_step = "" if failure.step is None else f" at step {failure.step}"
        of_stage = "" if failure.stage is None else f" (stage {failure.stage})"
        error = WorkerError(
            f"Worker rank {self.rank}{of_stage} failed{at_step} in {failure.operation}: {failure.message}",
            rank=self.rank,
            stage=failure.stage,
            step=failure.step,
            operation=failure.operation,
        )
        if failure.details:
            error.add_note(f"Traceback of worker rank {self.rank}:\n{failure.details}")
        return error

    def lost(self, session: int | None, doing: Doing) -> WorkerLostError:
        """The error to raise when the worker is gone, or does not answer."""
        stage = self._sessions[session].stage if session is not None and session in self._sessions else None
        of_stage = "" if stage is None else f", stage {stage}"
        at_step = "" if doing.step is None else f" at step {doing.step}"
        what = "ended unexpectedly"
        if not self.is_gone:
            what = f"is stopped or hangs: it has not answered for {STALLED_AFTER_S:.0f} s"
        return WorkerLostError(
            f"Worker rank {self.rank} (process {self.pid} on {self.host}{of_stage}) {what}{at_step}, while "
            f"the driver was {doing.operation}. {_WAY_OUT}",
            rank=self.rank,
            stage=stage,
            step=doing.step,
            operation=doing.operation,
        )

    # -- the end --

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
        """Wakes the reading thread, which then closes: a descriptor closed under a blocked read may be
        reused.
        """
        self._gone.set()
        with suppress(OSError):  # the other end was faster
            self._socket.shutdown(socket.SHUT_RDWR)

    # -- the reading thread --

    def _read(self) -> None:
        try:
            while True:
                self._take(receive_message(self._connection))
        except (EOFError, OSError):
            self._gone.set()
        with self._send_lock:
            self._connection.close()
            self._socket.close()

    def _take(self, message: Any) -> None:
        if isinstance(message, Pong):
            self._take_pong(message)
        elif isinstance(message, Failure) and message.run is not None:
            self._take_failure(message, message.run)
        elif isinstance(message, Failure | Reply) and message.session in self._sessions:
            state = self._sessions[message.session]
            state.num_answers += 1
            state.answers.put((state.num_answers, message))

    def _take_pong(self, message: Pong) -> None:
        ping = self._ping
        if message.number == ping.number:
            self.clock_offset_s = message.clock_s - (ping.clock_s + time.perf_counter()) / 2
            ping.is_answered = True

    def _take_failure(self, failure: Failure, run: int) -> None:
        """Of a run that is over, or of a handle that is gone: nobody is told, and the worker goes on."""
        state = self._sessions.get(failure.session)
        with self._runs_lock:
            is_ours = state is not None and run in state.runs
            if state is not None and is_ours:
                state.failure = failure
        if not is_ours:
            with self._send_lock:
                send_message(self._connection, AbortRun(failure.session, run))


@dataclass
class _PingState:
    """The last ping: its number, and when it was sent by `time.monotonic()` and by `time.perf_counter()`."""

    number: int = 0
    sent_s: float = 0.0
    clock_s: float = 0.0
    is_answered: bool = True
