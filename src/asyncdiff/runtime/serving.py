"""A worker's main loop: rounds and requests on the main thread, pings and aborts on a thread of their own."""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

from asyncdiff.protocol.messages import (
    AbortRun,
    CloseSession,
    Failure,
    Farewell,
    OpenSession,
    Ping,
    Pong,
    Reply,
    WorkerHello,
)
from asyncdiff.runtime.control import receive_message, send_at_once, send_message
from asyncdiff.runtime.session import WorkerSession

_GRACE_S = 2.0


class WorkerServer:
    """Serves the driver at the other end of `connection` until it says farewell or is gone."""

    def __init__(self, connection: Connection, rank: int, device: str = "") -> None:
        self._connection = connection
        send_at_once(connection)
        self._rank = rank
        self._device = device
        self._send_lock = threading.Lock()
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._sessions: dict[int, WorkerSession] = {}

    def serve(self) -> int:
        """Run until the driver ends; the exit code: 0 after a farewell, 1 if the driver vanished."""
        self._report(WorkerHello(self._rank, os.getpid(), socket.gethostname(), self._device))
        threading.Thread(target=self._listen, name="asyncdiff-control", daemon=True).start()
        while True:
            message = self._inbox.get()
            if message is None or isinstance(message, Farewell):
                return 1 if message is None else 0
            self._dispatch(message)

    def _dispatch(self, message: Any) -> None:
        if isinstance(message, OpenSession):
            self._open(message)
        elif isinstance(message, CloseSession):
            session = self._sessions.pop(message.session, None)
            if session is not None:
                session.close()
            self._report(Reply(message.session))
        elif message.session in self._sessions:  # else its opening has failed, which the driver knows
            self._sessions[message.session].handle(message)

    def _open(self, message: OpenSession) -> None:
        session = WorkerSession(message, self._report)
        try:
            session.open()
        except Exception as error:  # noqa: BLE001 (reported to the driver, which raises it)
            self._report(
                Failure(message.session, f"{type(error).__name__}: {error}", "", f"opening {message.device}")
            )
            return
        self._sessions[message.session] = session
        self._report(Reply(message.session))

    def _listen(self) -> None:
        """Read the connection; when the driver is gone, end the process even if the main thread is stuck."""
        code = 0
        try:
            while True:
                message = receive_message(self._connection)
                if isinstance(message, Ping):
                    self._report(Pong(message.number, time.perf_counter()))
                elif isinstance(message, AbortRun):
                    if message.session in self._sessions:
                        self._sessions[message.session].abort_run(
                            message.run, transport_is_lost=message.transport_is_lost
                        )
                else:
                    self._inbox.put(message)
                    if isinstance(message, Farewell):
                        break
        except (EOFError, OSError):
            code = 1
            self._inbox.put(None)
        time.sleep(_GRACE_S)
        os._exit(code)

    def _report(self, message: object) -> None:
        try:
            with self._send_lock:
                send_message(self._connection, message)
        except OSError:
            pass  # the driver is gone: the listening thread sees it too and ends the process
