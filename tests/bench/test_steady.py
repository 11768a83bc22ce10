"""The rounds of the steady state, from a report and the step ends of the same run."""

from __future__ import annotations

import pytest

from asyncdiff.bench.steady import (
    calls_per_step,
    expected_bytes_per_step,
    median_ms_per_step,
    steady_rounds,
)
from asyncdiff.bench.timed_run import TimedRun
from asyncdiff.pipeline import RunReport
from asyncdiff.pipeline.report import DeviceRound, StepReport
from asyncdiff.planner import Plan, Predictions
from asyncdiff.simulation import COMPUTE, Span, Timeline

NOTHING = DeviceRound(compute_s=0.0, wait_s=0.0, send_s=0.0, bytes_sent=0)


def report(first_round: int, stride: int, num_steps: int, channels: int = 1) -> RunReport:
    """Two devices; the round of step s computes s + 1 seconds on the first, 0.5 on the second."""
    steps = []
    for step in range(num_steps):
        begins = step < first_round or (step - first_round) % stride == 0
        busy = (DeviceRound(step + 1.0, 0.25, 0.125, 10), DeviceRound(0.5, 0.0, 0.0, 2))
        steps.append(StepReport(step, 1.0, False, busy if begins else (NOTHING, NOTHING)))
    spans = [
        Span(rank, f"stage {rank} step {step}", 0.0, 1.0, COMPUTE)
        for rank in range(2)
        for step in range(num_steps)
        for _ in range(channels)
    ]
    zeros = (0, 0)
    return RunReport(
        steps=tuple(steps),
        denoise_s=1.0,
        weight_bytes=zeros,
        resident_bytes=zeros,
        cpu_s=(0.0, 0.0),
        device_peak_bytes=zeros,
        devices=("cpu", "cpu"),
        timeline=Timeline(tuple(spans), 1.0),
    )


def test_rounds_have_the_seconds_and_the_devices_of_their_steps() -> None:
    ends = tuple(
        100.0 + 10 * step for step in range(12)
    )  # ten seconds a step, text encoding before the first
    rounds = steady_rounds(report(1, 2, 12), TimedRun(220.0, ends), first_step=5, stride=2)
    # Steps 5 and 6, 7 and 8; 9 and 10 are the round before the last one, which is step 11.
    assert [each.seconds for each in rounds] == [20.0, 20.0]
    assert [each.devices[0].compute_s for each in rounds] == [6.0, 8.0]
    assert [each.overhead_s for each in rounds] == [14.0, 12.0]
    assert [each.bytes_sent for each in rounds] == [12, 12]
    assert median_ms_per_step(rounds, "compute_s", 2) == (3500.0, 250.0)
    assert median_ms_per_step(rounds, "send_s", 2) == (62.5, 0.0)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_calls_per_step_are_counted(channels: int) -> None:
    assert calls_per_step(report(1, 1, 6, channels)) == channels


def plan(kind: str, num_stages: int, stride: int) -> Plan:
    predictions = Predictions(
        segment_seconds=(1.0,),
        stage_seconds=(1.0,) * num_stages,
        balance=1.0,
        ideal_speedup=2.0,
        crossing_bytes_per_step=1000.0,
        crossing_bytes=(),
        prediction_bytes=60,
        parameter_bytes=(0,) * num_stages,
    )
    return Plan(
        kind=kind,
        stages=tuple((f"block.{stage}",) for stage in range(num_stages)),
        devices=("cpu",) * (num_stages + stride - 1),
        stride=stride,
        predictions=predictions,
    )


@pytest.mark.parametrize(
    ("kind", "num_stages", "stride", "predictions_that_cross"),
    [
        ("chain", 2, 1, 1.0),  # the driver has the first stage, the last one predicts
        ("nested", 2, 1, 0.0),  # the driver has the outer stage, which predicts
        ("chain", 2, 3, 1.0),
        ("nested", 2, 3, 2 / 3),  # one of three copies is the driver's own
        ("chain", 1, 2, 1 / 2),
    ],
)
def test_predictions_cross_where_another_device_makes_them(
    kind: str, num_stages: int, stride: int, predictions_that_cross: float
) -> None:
    expected = 1000.0 + 60 * predictions_that_cross
    assert expected_bytes_per_step(plan(kind, num_stages, stride)) == pytest.approx(expected)
    assert expected_bytes_per_step(plan(kind, num_stages, stride), 2) == pytest.approx(2 * expected)
