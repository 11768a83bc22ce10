"""The steady state of a run on several devices: what each device does in a round, and what crosses."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from asyncdiff.bench.timed_run import TimedRun
from asyncdiff.pipeline import RunReport
from asyncdiff.pipeline.report import DeviceRound
from asyncdiff.planner import Plan
from asyncdiff.planner.candidates import bytes_per_step
from asyncdiff.simulation import COMPUTE


@dataclass(frozen=True)
class SteadyRound:
    """One round of `stride` steps, or the steps from one refresh of guidance to the next: `seconds` by the
    driver's clock, and what each device did."""

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
    found = []
    for index, each in enumerate(seconds):
        start = first_step + stride * index
        of_steps = [step.devices for step in report.steps[start : start + stride]]
        found.append(SteadyRound(each, tuple(map(_sum, zip(*of_steps, strict=True)))))
    return found


def _sum(rounds: tuple[DeviceRound, ...]) -> DeviceRound:
    return DeviceRound(*map(sum, zip(*map(astuple, rounds), strict=True)))


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
