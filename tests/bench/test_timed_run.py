"""When steps ended, and what follows for steps and rounds."""

from __future__ import annotations

import json
import types

import pytest
import torch

from asyncdiff.bench.timed_run import StepEnds, TimedRun

# Step 0 ends at 10, then one step each at 11, 13, 16, 20, 25, 31, 38.
RUN = TimedRun(40.0, (10.0, 11.0, 13.0, 16.0, 20.0, 25.0, 31.0, 38.0))


def test_steps_begin_where_the_one_before_ends() -> None:
    assert RUN.step_seconds() == [10, 1, 2, 3, 4, 5, 6, 7]
    assert RUN.step_seconds(1) == [1, 2, 3, 4, 5, 6, 7]


def test_rounds_are_whole_and_leave_out_the_last_two() -> None:
    assert RUN.round_seconds(3, 1) == [3, 4, 5]
    assert RUN.round_seconds(1, 2) == [(1 + 2) / 2, (3 + 4) / 2]  # not those of steps 5 and 6, and of step 7
    assert RUN.round_seconds(2, 2) == [(2 + 3) / 2]  # not those of steps 4 and 5, 6 and 7
    assert RUN.round_seconds(3, 3) == []


def test_json_gives_the_run_back() -> None:
    assert TimedRun.from_json(json.loads(json.dumps(RUN.to_json()))) == RUN


def test_ends_count_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    now = types.SimpleNamespace(seconds=100.0)
    monkeypatch.setattr("time.perf_counter", lambda: now.seconds)
    ends = StepEnds(torch.device("cpu"))
    for now.seconds in (102.0, 105.0):
        ends.mark()
    now.seconds = 105.25
    assert ends.finish() == TimedRun(5.25, (2.0, 5.0))


@pytest.mark.gpu
def test_ends_on_cuda_are_those_of_the_device() -> None:
    """Launching is over long before the device is: ends taken on the host would lie at the very beginning."""
    matrix = torch.randn(8192, 8192, device="cuda:0")
    matrix @ matrix
    ends = StepEnds(torch.device("cuda:0"))
    for _ in range(8):
        matrix @ matrix
        ends.mark()
    run = ends.finish()
    assert 0.5 * run.seconds < run.step_ends[-1] <= run.seconds
    assert all(second > 0 for second in run.step_seconds())
