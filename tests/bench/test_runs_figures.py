"""What is computed from measured seconds."""

from __future__ import annotations

import pytest

from asyncdiff.bench.runs.figures import Spread, machine_step_speedup, percentile, whole_run_speedup
from asyncdiff.bench.runs.measure import _steady_stretch
from asyncdiff.simulation import COMPUTE, WAIT, Span, Timeline


def test_spread_is_over_all_values_and_per_run() -> None:
    assert Spread.of([[4.0, 1.0, 2.0], [8.0]]) == Spread(3.0, 1.0, 8.0, (2.0, 8.0))


def test_ratios_are_within_a_run_so_that_drift_drops_out() -> None:
    # The machine became three times as slow in the second run, under both.
    before, after = Spread.of([[2.0], [6.0]]), Spread.of([[1.0], [3.0]])
    assert Spread.of_ratios(before, after) == Spread(2.0, 2.0, 2.0, (2.0, 2.0))
    assert Spread.of_ratios(before, after, factor=2.0).median == 4.0


@pytest.mark.parametrize("warmup_steps", [1, 3, 10])
@pytest.mark.parametrize("others_s", [0.0, 7.0])
def test_whole_run_speeds_up_as_its_steps_added_up_one_by_one(warmup_steps: int, others_s: float) -> None:
    before = [0.5] * 10
    after = [0.5 if step < warmup_steps else 0.5 / 1.9 for step in range(10)]
    expected = (others_s + sum(before)) / (others_s + sum(after))
    found = whole_run_speedup(others_s + sum(before), 0.5, 10, warmup_steps, 1.9)
    assert found == pytest.approx(expected, rel=1e-12)


def test_whole_run_of_steps_a_little_faster_than_their_median_has_nothing_beside_them() -> None:
    assert whole_run_speedup(4.9, 0.5, 10, 1, 1.9) == whole_run_speedup(5.0, 0.5, 10, 1, 1.9)


def test_machine_allows_the_ceiling_without_stride() -> None:
    assert machine_step_speedup(2, 1, ceiling=1.9, num_devices=2) == pytest.approx(1.9)
    # Three devices that keep 90 % each: two stages and two steps a round would be four times as fast.
    assert machine_step_speedup(2, 2, ceiling=2.7, num_devices=3) == pytest.approx(3.6)


def test_percentile_of_few_values() -> None:
    assert percentile([3.0], 90) == 3.0
    assert percentile([float(value) for value in range(11)], 90) == pytest.approx(9.0)


def test_stretch_begins_with_a_round_and_is_cut_at_its_end() -> None:
    spans = [Span(0, f"stage 0 step {step}", step, step + 0.9, COMPUTE) for step in range(10)]
    spans += [Span(1, f"stage 1 step {step}", step + 0.2, step + 1.1, COMPUTE) for step in range(10)]
    spans += [Span(1, "wait for it", 4.3, 4.4, WAIT)]
    found = _steady_stretch(Timeline(tuple(spans), 10.5), seconds=2.0)
    assert [(span.rank, span.start_ms, span.end_ms) for span in found if span.rank == 0] == [
        (0, 0.0, pytest.approx(900)),
        (0, 1000.0, pytest.approx(1900)),
    ]
    others = [(span.name, span.start_ms, span.end_ms) for span in found if span.rank == 1]
    assert others == [
        ("stage 1 step 4", 0.0, pytest.approx(100)),  # cut off on the left: the round before
        ("stage 1 step 5", pytest.approx(200), pytest.approx(1100)),
        ("stage 1 step 6", pytest.approx(1200), pytest.approx(2000)),  # and on the right
    ]
