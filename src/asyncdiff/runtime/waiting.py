"""Waiting for what cannot be interrupted: in a thread, which the main thread waits for in turn."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

# Liveness is watched over the control connections; a transport itself never gives up on a slow peer.
NO_TIMEOUT = timedelta(days=365)
WATCH_INTERVAL_S = 0.1

Watch = Callable[[], None]
"""Called every 0.1 s while something is waited for; may raise to end the wait."""


class Waited:
    """What a waiter thread has been told to wait for. Nothing wakes a thread more cheaply than a lock."""

    def __init__(self, finish: Callable[[], Any], watch: Watch | None) -> None:
        self._finish: Callable[[], Any] | None = finish
        self._watch = watch
        self._error: Exception | None = None
        self._result: Any = None
        self._done = threading.Lock()
        self._done.acquire()

    def run(self) -> None:
        """Called by the waiter thread."""
        assert self._finish is not None
        try:
            self._result = self._finish()
        except Exception as error:  # noqa: BLE001 (whatever the backend raises belongs to whoever waits)
            self._error = error
        self._finish = None  # and with it the buffers it kept alive
        self._done.release()

    def wait(self) -> Any:
        """What `finish` returned, however often it is asked for; every 0.1 s `watch` may end the wait."""
        while not self._done.acquire(timeout=WATCH_INTERVAL_S):
            if self._watch is not None:
                self._watch()
        self._done.release()
        if self._error is not None:
            raise self._error
        return self._result


class Waiter:
    """Waits for the transfers of one stream and peer, in order, off the main thread.

    gloo completes a transfer only inside `Work.wait()`, which cannot be interrupted by Ctrl-C nor be given a
    time-out without breaking the pair; a thread can, and the main thread can look at the control connections.
    """

    def __init__(self, name: str) -> None:
        self._queue: queue.SimpleQueue[Waited | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, waited: Waited) -> Waited:
        self._queue.put(waited)
        return waited

    def close(self) -> None:
        self._queue.put(None)

    def _run(self) -> None:
        while (waited := self._queue.get()) is not None:
            waited.run()
            del waited  # or its tensor would live until the next one comes


def watched(make: Callable[[], Any], watch: Watch | None) -> Any:
    """Call `make`, which cannot be interrupted, in a thread, and let `watch` end the wait for it."""
    waiter = Waiter("asyncdiff-joining")
    try:
        return waiter.submit(Waited(make, watch)).wait()
    finally:
        waiter.close()
