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

    def __enter__(self) -> None:
        self._noted: tuple[int, FrameType | None] | None = None
        handler = signal.getsignal(signal.SIGINT)
        is_deferring = isinstance(getattr(handler, "__self__", None), interrupts_deferred)
        is_needed = callable(handler) and not is_deferring
        self._handler: Any = handler if is_needed and _in_main_thread() else None
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._note)

    def __exit__(self, *exc: object) -> None:
        if self._handler is None:
            return
        signal.signal(signal.SIGINT, self._handler)
        if self._noted is not None:
            self._handler(*self._noted)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._noted is not None:
            self._handler(number, frame)
        self._noted = (number, frame)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
