"""Ctrl-C between the steps of a handshake, never within one.

A control message that is written by half, or a tensor that is sent but still counted as owed, cannot be
repaired afterwards. So the few places where that could happen hold Ctrl-C back for their duration; waits and
forwards do not.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class interrupts_deferred:  # noqa: N801 (used like a function: `with interrupts_deferred():`)
    """Hold back Ctrl-C until the block is done; a second one comes through at once.

    Does nothing in other threads than the main one (Python never interrupts them), where Ctrl-C is ignored,
    and within another such block.
    """

    _outermost: interrupts_deferred | None = None

    def __enter__(self) -> None:
        self._noted: tuple[int, FrameType | None] | None = None
        self._handler: Any = None
        # Blocks within a block are many, several a step, and looking the handler up takes microseconds.
        if interrupts_deferred._outermost is not None or not _in_main_thread():
            return
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler):
            self._handler = handler
            signal.signal(signal.SIGINT, self._note)
            interrupts_deferred._outermost = self

    def __exit__(self, *exc: object) -> None:
        if self._handler is None:
            return
        interrupts_deferred._outermost = None
        signal.signal(signal.SIGINT, self._handler)
        if self._noted is not None:
            self._handler(*self._noted)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._noted is not None:
            self._handler(number, frame)
        self._noted = (number, frame)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
