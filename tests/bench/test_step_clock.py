"""The clock of a pipeline call."""

from __future__ import annotations

import math
import types
from typing import Any

import pytest

from asyncdiff.bench.step_clock import StepClock


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A time that the test sets."""
    now = types.SimpleNamespace(seconds=0.0)
    monkeypatch.setattr("time.perf_counter", lambda: now.seconds)
    return now


def run_steps(clock: StepClock, at: types.SimpleNamespace, ends: list[float]) -> None:
    pipe: Any = types.SimpleNamespace(num_timesteps=len(ends))
    for step, end in enumerate(ends):
        at.seconds = end
        assert clock(pipe, step, 0, {"latents": None}) == {"latents": None}
    clock.finish()


def test_median_interval_without_the_skipped_steps(at: types.SimpleNamespace) -> None:
    clock = StepClock("x", skip=2)
    run_steps(clock, at, [10.0, 20.0, 21.0, 23.0, 24.0])
    assert clock.seconds_per_step == 1.0  # of 1, 2, 1
    assert clock.seconds == 24.0
    assert clock.num_steps == 5


def test_too_few_steps_have_no_time(at: types.SimpleNamespace) -> None:
    clock = StepClock("x", skip=1)
    run_steps(clock, at, [1.0])
    assert math.isnan(clock.seconds_per_step)


def test_tells_how_far_it_is(at: types.SimpleNamespace) -> None:
    told: list[tuple[str, int, int]] = []
    run_steps(StepClock("x", progress=lambda *what: told.append(what)), at, [1.0, 2.0])
    assert told == [("x", 1, 2), ("x", 2, 2)]
