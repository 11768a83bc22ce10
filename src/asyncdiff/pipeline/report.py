"""What happened in the last run: per step and device, as recorded by the workers."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

from asyncdiff.protocol.messages import WorkerReport
from asyncdiff.simulation import COMPUTE, TRANSFER, WAIT, Span, Timeline

_CATEGORIES = {"compute": COMPUTE, "wait": WAIT, "send": TRANSFER}


@dataclass(frozen=True)
class CallRecord:
    """One denoiser call as the driver saw it; times of `time.perf_counter()`. `in_order`: whether its stages
    ran one after the other."""

    step: int
    channel: Hashable
    start_s: float
    end_s: float
    in_order: bool


@dataclass(frozen=True)
class DeviceRound:
    """What one device did in the round that began at a step. `send_s`: handing over what others read."""

    compute_s: float
    wait_s: float
    send_s: float
    bytes_sent: int


@dataclass(frozen=True)
class StepReport:
    """`seconds`: how long the driver's denoiser calls of this step took. `in_order`: whether the stages ran
    one after the other in any of them. `devices`: per rank, the round that began at this step (zeros where
    none did)."""

    step: int
    seconds: float
    in_order: bool
    devices: tuple[DeviceRound, ...]

    @property
    def bytes_sent(self) -> int:
        return sum(device.bytes_sent for device in self.devices)


@dataclass(frozen=True)
class RunReport:
    """The last run. `denoise_s`: from the first denoiser call to the end of the last one. `weight_bytes`,
    `resident_bytes`, `cpu_s`: per rank, now; the local executor holds everything in one process, and its
    weights count as those of rank 0. `device_peak_bytes`: per rank, the most its process has held on CUDA
    devices, 0 without one. `devices`: one per rank, or the single one of the local executor. A run that was
    broken off has the steps it came to."""

    steps: tuple[StepReport, ...]
    denoise_s: float
    weight_bytes: tuple[int, ...]
    resident_bytes: tuple[int, ...]
    cpu_s: tuple[float, ...]
    device_peak_bytes: tuple[int, ...]
    devices: tuple[str, ...]
    timeline: Timeline

    @property
    def steps_in_order(self) -> tuple[int, ...]:
        """The steps of warm-up, and those that `warmup_steps="auto"` added."""
        return tuple(step.step for step in self.steps if step.in_order)

    @property
    def total_s(self) -> float:
        """Seconds inside the denoiser's calls."""
        return sum(step.seconds for step in self.steps)

    @property
    def bytes_sent(self) -> int:
        """Bytes that crossed between stages and back to the driver, all devices together."""
        return sum(step.bytes_sent for step in self.steps)

    def write_trace(self, path: str | Path) -> None:
        """Write the run for chrome://tracing or https://ui.perfetto.dev."""
        self.timeline.write_trace(path)


@dataclass(frozen=True)
class RunRecord:
    """One denoiser's part in a run: the driver's calls, and per rank what the worker recorded."""

    calls: Sequence[CallRecord]
    workers: Sequence[WorkerReport]


def build_report(
    records: Sequence[RunRecord], devices: Sequence[str], beside: Sequence[WorkerReport] = ()
) -> RunReport:
    """Put together what each denoiser noted of one run. Worker clocks are the driver's. `beside`: of further
    ranks, after those of the denoisers."""
    calls = [call for record in records for call in record.calls]
    workers = [_of_one_rank(reports) for reports in zip(*(record.workers for record in records), strict=True)]
    workers.extend(beside)
    start_s = min(call.start_s for call in calls)
    steps = sorted({call.step for call in calls})
    return RunReport(
        steps=tuple(_step(step, calls, workers) for step in steps),
        denoise_s=max(call.end_s for call in calls) - start_s,
        weight_bytes=tuple(worker.weight_bytes for worker in workers),
        resident_bytes=tuple(worker.resident_bytes for worker in workers),
        cpu_s=tuple(worker.cpu_s for worker in workers),
        device_peak_bytes=tuple(worker.device_peak_bytes for worker in workers),
        devices=tuple(devices),
        timeline=_timeline(calls, workers, start_s, steps),
    )


def _of_one_rank(reports: Sequence[WorkerReport]) -> WorkerReport:
    """A worker's reports about each denoiser, of which it holds a stage, as one."""
    return WorkerReport(
        rounds=tuple(record for report in reports for record in report.rounds),
        weight_bytes=sum(report.weight_bytes for report in reports),
        resident_bytes=max(report.resident_bytes for report in reports),
        cpu_s=max(report.cpu_s for report in reports),
        device_peak_bytes=max(report.device_peak_bytes for report in reports),
    )


def _step(step: int, calls: Sequence[CallRecord], workers: Sequence[WorkerReport]) -> StepReport:
    devices = []
    for worker in workers:
        rounds = [record for record in worker.rounds if record.first_step == step]
        devices.append(
            DeviceRound(
                compute_s=sum(record.compute_s for record in rounds),
                wait_s=sum(record.wait_s for record in rounds),
                send_s=sum(
                    end - begin
                    for record in rounds
                    for _, category, begin, end in record.spans
                    if category == "send"
                ),
                bytes_sent=sum(record.bytes_sent for record in rounds),
            )
        )
    own = [call for call in calls if call.step == step]
    return StepReport(
        step,
        seconds=sum(call.end_s - call.start_s for call in own),
        in_order=any(call.in_order for call in own),
        devices=tuple(devices),
    )


def _timeline(
    calls: Sequence[CallRecord], workers: Sequence[WorkerReport], start_s: float, steps: Sequence[int]
) -> Timeline:
    spans = tuple(
        Span(rank, name, begin - start_s, end - start_s, _CATEGORIES[category])
        for rank, worker in enumerate(workers)
        for record in worker.rounds
        for name, category, begin, end in record.spans
    )
    seconds = tuple(sum(call.end_s - call.start_s for call in calls if call.step == step) for step in steps)
    return Timeline(spans, max(call.end_s for call in calls) - start_s, seconds)
