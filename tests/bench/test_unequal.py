"""The split for a slow device gives it less, and what is ideal follows from measured speeds."""

from __future__ import annotations

import os

import pytest

from asyncdiff.bench.unequal import SplitTime, Unequal, run_unequal, two_cores


def test_speed_ups_are_against_the_fast_core() -> None:
    even = SplitTime((1.0, 1.0), "chain", (0.5, 0.5), 100.0, (110.0, 90.0, 100.0))
    result = Unequal("sd21", 256, "bfloat16", 150.0, 0.5, (even,))
    assert result.to_json()["splits"][0]["speed_up"] == 1.5
    assert [row[2] for row in result.rows()] == ["150.0", "300.0", "100.0"]


@pytest.mark.wide
@pytest.mark.timeout(600)
@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="needs two cores to pin to",
)
def test_slow_core_gets_less_work() -> None:
    cores = os.sched_getaffinity(0)
    result = run_unequal(arch="demo", size=64, dtype="float32", speed=0.5, steps=2, runs=1, cores=two_cores())
    assert os.sched_getaffinity(0) == cores
    even, weighted = result.splits
    assert even.work_share == pytest.approx((1 / 2, 1 / 2), abs=0.05)
    assert weighted.work_share == pytest.approx((2 / 3, 1 / 3), abs=0.05)
    assert result.slow_speed < 1
    for split in result.splits:
        assert split.ms > 0
        assert split.ideal_ms > 0
