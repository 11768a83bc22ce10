"""The control connection between the driver and a worker."""

from __future__ import annotations

import os
import socket
from multiprocessing.connection import Client, Connection, Listener
from threading import Thread

from asyncdiff.protocol.messages import WorkerHello
from asyncdiff.runtime.control import WorkerConnection
from asyncdiff.runtime.serving import WorkerServer


def sends_at_once(connection: Connection) -> bool:
    with socket.socket(fileno=os.dup(connection.fileno())) as own:
        return own.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


def test_no_message_waits_until_another_is_acknowledged() -> None:
    """Two messages in one step (a round, and the announcement of the next) had cost 40 ms at times."""
    with Listener(("127.0.0.1", 0)) as listener:
        accepted: list[Connection] = []
        accepting = Thread(target=lambda: accepted.append(listener.accept()))
        accepting.start()
        worker_end = Client(listener.address)
        accepting.join()
    (driver_end,) = accepted
    with worker_end, driver_end:
        assert not sends_at_once(driver_end)
        driver = WorkerConnection(driver_end, WorkerHello(1, os.getpid(), ""))
        WorkerServer(worker_end, 1)
        assert sends_at_once(driver_end)
        assert sends_at_once(worker_end)
        worker_end.close()
        driver.close()
