"""Ctrl-C is held back by blocks that ask for it, for as long as the outermost of them lasts."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest

from asyncdiff.runtime.interrupts import interrupts_deferrable, interrupts_deferred

Around = Callable[[], AbstractContextManager[Any]]
AROUND = [nullcontext, interrupts_deferrable]


def press() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.fixture(autouse=True)
def _handler_is_put_back() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("around", AROUND)
def test_comes_when_the_outermost_block_ends(around: Around) -> None:
    done = []

    def blocks() -> None:
        with around():
            with interrupts_deferred():
                press()
                with interrupts_deferred():
                    done.append("inner")
                done.append("outer")
            done.append("after")

    with pytest.raises(KeyboardInterrupt):
        blocks()
    assert done == ["inner", "outer"]


@pytest.mark.parametrize("around", AROUND)
def test_comes_at_once_outside_of_blocks(around: Around) -> None:
    done = []

    def blocks() -> None:
        with around():
            with interrupts_deferred():
                pass
            press()
            done.append("after")

    with pytest.raises(KeyboardInterrupt):
        blocks()
    assert not done


@pytest.mark.parametrize("around", AROUND)
def test_a_second_one_is_not_held_back(around: Around) -> None:
    done = []

    def block() -> None:
        with around(), interrupts_deferred():
            press()
            done.append("first")
            press()
            done.append("second")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert done == ["first"]


@pytest.mark.parametrize("around", AROUND)
def test_blocks_work_again_after_an_interrupt(around: Around) -> None:
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt), around(), interrupts_deferred():
            press()
    with around():
        with pytest.raises(KeyboardInterrupt), interrupts_deferred():
            press()
        with pytest.raises(KeyboardInterrupt):
            press()
        with interrupts_deferred():
            pass


@pytest.mark.parametrize("around", AROUND)
def test_an_error_in_a_block_does_not_swallow_it(around: Around) -> None:
    def block() -> None:
        with around(), interrupts_deferred():
            press()
            raise ValueError("of the block")

    with pytest.raises(KeyboardInterrupt) as caught:
        block()
    assert isinstance(caught.value.__context__, ValueError)


@pytest.mark.parametrize("around", AROUND)
def test_another_threads_blocks_hold_nothing_back(around: Around) -> None:
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with around(), interrupts_deferred():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert entered.wait(10)
        with around(), pytest.raises(KeyboardInterrupt):
            press()
    finally:
        leave.set()
        thread.join()


@pytest.mark.parametrize("around", AROUND)
def test_stays_ignored_where_it_is(around: Around) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with around(), interrupts_deferred():
            press()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
