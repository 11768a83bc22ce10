"""The steady state of a run on several devices: what each device does in a round, and what crosses."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from asyncdiff.bench.timed_run import TimedRun
from asyncdiff.pipeline import RunReport
from asyncdiff.pipeline.report import DeviceRound
from asyncdiff.planner import Plan
from asyncdiff.planner.candidates import bytes_per_step
from asyncdiff.simulation import COMPUTE


@dataclass(frozen=True)
class SteadyRound:
    """One round of `stride` steps: `seconds` by the driver's clock, and what each device did."""

    seconds: float
    devices: tuple[DeviceRound, ...]

    @property
    def overhead_s(self) -> float:
        """What the round takes beyond the compute of its slowest device."""
        return self.seconds - max(device.compute_s for device in self.devices)

    @property
    def bytes_sent(self) -> int:
        return sum(device.bytes_sent for device in self.devices)


def steady_rounds(report: RunReport, run: TimedRun, first_step: int, stride: int) -> list[SteadyRound]:
    """The rounds from `first_step` on, as `TimedRun.round_seconds` counts them."""
    seconds = [stride * each for each in run.round_seconds(first_step, stride)]
    begun = [report.steps[first_step + stride * index] for index in range(len(seconds))]
    return [SteadyRound(each, step.devices) for each, step in zip(seconds, begun, strict=True)]


def median_ms_per_step(rounds: Sequence[SteadyRound], name: str, stride: int) -> tuple[float, ...]:
    """Per device, the median of a `DeviceRound`'s seconds (`name`), in milliseconds per step."""
    return tuple(
        1e3 * statistics.median(getattr(each.devices[rank], name) for each in rounds) / stride
        for rank in range(len(rounds[0].devices))
    )


def expected_bytes_per_step(plan: Plan, calls_per_step: int = 1) -> float:
    """What the graph says that must cross in a step of the steady state, states and predictions."""
    return calls_per_step * bytes_per_step(plan)


def calls_per_step(report: RunReport) -> int:
    """How many denoiser calls a step of this run has: guidance as two calls makes two."""
    forwards = Counter(
        span.name for span in report.timeline.spans if span.rank == 0 and span.category == COMPUTE
    )
    return max(forwards.values())
