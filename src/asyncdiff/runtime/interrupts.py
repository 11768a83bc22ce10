"""Ctrl-C between the steps of a handshake, never within one.

A control message that is written by half, or a tensor that is sent but still counted as owed, cannot be
repaired afterwards. So the few places where that could happen hold Ctrl-C back for their duration; waits and
forwards do not.
"""

from __future__ import annotations

import _signal  # `signal` without its translation to and from enums, which takes longer than all the rest
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
        self._handling: _Handling | None = None
        self._is_first = False
        if not _in_main_thread():
            return
        if _Handling.current is None:
            self._is_first = True
            self._handling = _Handling.begin()
        else:
            self._handling = _Handling.current
            self._handling.depth += 1

    def __exit__(self, *exc: object) -> None:
        if self._handling is None:
            return
        if self._is_first:
            self._handling.end()
        else:
            self._handling.release()


class interrupts_deferrable:  # noqa: N801
    """Blocks of `interrupts_deferred` within this one are entered and left in a microsecond.

    To put a handler of Ctrl-C in its place takes tens of them where nothing is in the caches, and a denoiser
    call has several such blocks.
    """

    def __enter__(self) -> None:
        self._handling: _Handling | None = None
        if _Handling.current is not None or not _in_main_thread():
            return
        handling = _Handling.begin()
        if handling.noted is not None:
            handling.end()
        self._handling = handling
        handling.depth = 0

    def __exit__(self, *exc: object) -> None:
        if self._handling is not None:
            self._handling.end()


class _Handling:
    """Stands in the place of Ctrl-C's handler (`original`; None where it is ignored), and notes the first
    that comes while `depth` blocks hold it back."""

    current: _Handling | None = None

    def __init__(self, original: Any) -> None:
        self.depth = 1  # from the moment it is in its place, until that is noted
        self.noted: tuple[int, FrameType | None] | None = None
        self._original: Any = original if callable(original) else None

    @staticmethod
    def begin() -> _Handling:
        handling = _Handling(_signal.getsignal(signal.SIGINT))
        if handling._original is not None:
            _signal.signal(signal.SIGINT, handling)
        _Handling.current = handling
        return handling

    def end(self) -> None:
        """Put the original back, then let it have what is held back."""
        self.depth = 1
        _Handling.current = None
        if self._original is not None:
            _signal.signal(signal.SIGINT, self._original)
        self.release()

    def release(self) -> None:
        """One block less that holds Ctrl-C back."""
        self.depth -= 1
        if self.depth == 0 and self.noted is not None:
            noted, self.noted = self.noted, None
            self._original(*noted)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.depth > 0 and self.noted is None:
            self.noted = (number, frame)
        else:
            self._original(number, frame)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
