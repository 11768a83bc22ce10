"""Joining the processes that torchrun started: rank 0 is the driver, the others become its workers.

They meet through torchrun's own store (never the default process group) and stay joined until the driver
ends, so that a second `parallelize` in the script finds them again.
"""

from __future__ import annotations

import atexit
import os
import pickle
import secrets
import signal
import socket
import sys
import threading
from datetime import timedelta
from multiprocessing.connection import Client, Listener

import psutil
import torch.distributed as dist

from asyncdiff.errors import WorkerError
from asyncdiff.runtime.control import WorkerConnection, receive_message
from asyncdiff.runtime.remote import WorkerUsers
from asyncdiff.runtime.serving import WorkerServer

_START_TIMEOUT = timedelta(seconds=300)
_KEY = "asyncdiff/control"


class TorchrunWorkers:
    """The other ranks of this torchrun job, as workers. Kept for the life of the process."""

    def __init__(self, connections: dict[int, WorkerConnection], host: str) -> None:
        self.connections = connections
        self.users = WorkerUsers()
        self.host = host
        here = socket.gethostname()
        self.is_local = all(connection.host == here for connection in connections.values())

    def kill(self, rank: int) -> None:
        """End a stalled worker of this host at once; one on another host is left to its torchrun."""
        connection = self.connections[rank]
        if connection.host == socket.gethostname():
            psutil.Process(connection.pid).kill()

    def close(self) -> None:
        """The workers outlive a handle: they end with the driver."""


_joined: TorchrunWorkers | None = None


def join_torchrun(devices: list[str]) -> TorchrunWorkers:
    """On rank 0: the workers. On other ranks this does not return: it raises `SystemExit` when the driver
    ends.
    """
    global _joined
    rank = int(os.environ["RANK"])
    if rank > 0:
        raise SystemExit(_serve(rank, _own_device(devices[rank])))
    if _joined is None:
        _joined = _accept(int(os.environ["WORLD_SIZE"]))
        atexit.register(_say_farewell)
    return _joined


def _own_device(device: str) -> str:
    """A CUDA rank without an index uses the GPU of its local rank, as torchrun scripts do."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device


def _store() -> dist.Store:
    """torchrun's own store, which its agent keeps open for any number of clients."""
    store, _, _ = next(dist.rendezvous("env://", timeout=_START_TIMEOUT))
    return dist.PrefixStore("asyncdiff", store)


def _accept(world_size: int) -> TorchrunWorkers:
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    authkey = secrets.token_bytes(32)
    with Listener((host, 0), backlog=world_size, authkey=authkey) as listener:
        _store().set(_KEY, pickle.dumps((listener.address, authkey)))  # type: ignore[arg-type]
        listener._listener._socket.settimeout(_START_TIMEOUT.total_seconds())  # type: ignore[attr-defined]
        connections: dict[int, WorkerConnection] = {}
        while len(connections) < world_size - 1:
            try:
                connection = listener.accept()
            except TimeoutError:
                late = min(set(range(1, world_size)) - set(connections))
                raise WorkerError(
                    f"Rank {late} has not called parallelize within {_START_TIMEOUT.total_seconds():.0f} s.",
                    rank=late,
                ) from None
            hello = receive_message(connection)
            connections[hello.rank] = WorkerConnection(connection, hello)
    return TorchrunWorkers(connections, host)


def _serve(rank: int, device: str) -> int:
    address, authkey = pickle.loads(_store().get(_KEY))
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's
    sys.stdout.flush()
    return WorkerServer(Client(address, authkey=authkey), rank, device).serve()


def _say_farewell() -> None:
    assert _joined is not None
    for connection in _joined.connections.values():
        connection.farewell()
