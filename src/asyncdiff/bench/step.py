"""Milliseconds of one denoising step: in order, asynchronously in the steady state, and what the machine can
do.

All in one run, interleaved, because only ratios measured side by side mean anything on a shared machine.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from asyncdiff.bench.architectures import architecture_named
from asyncdiff.bench.configurations import Configuration
from asyncdiff.bench.environment import describe_environment
from asyncdiff.bench.progress import Progress, no_progress
from asyncdiff.bench.room import check_room
from asyncdiff.bench.steady import expected_bytes_per_step, median_ms_per_step, steady_rounds
from asyncdiff.bench.timed_run import TimedRun
from asyncdiff.bench.whole_model import WholeModelProcess, measure_together
from asyncdiff.bench.workload import Subject, Workload, denoiser_bytes, load, run_timed
from asyncdiff.config import Settings, settle_groups
from asyncdiff.errors import ConfigurationError
from asyncdiff.pipeline import Handle, Plan, parallelize, plan
from asyncdiff.runtime.allocator import freed_memory_kept

_WARMUP_STEPS = 1
_IDLE_S = 2.0


@dataclass
class Samples:
    """Seconds per step, one list per run. `together`: of processes that all run the forward at once, with a
    group's part of the batch."""

    in_order: list[list[float]] = field(default_factory=list)
    asynchronous: list[list[float]] = field(default_factory=list)
    together: list[list[float]] = field(default_factory=list)
    all_threads: list[list[float]] = field(default_factory=list)

    def median_ms(self, kind: str) -> float:
        """Over all runs of a kind."""
        return 1e3 * statistics.median(itertools.chain(*getattr(self, kind)))

    def spread_ms(self, kind: str) -> tuple[float, float]:
        """Lowest and highest of a kind."""
        values = list(itertools.chain(*getattr(self, kind)))
        return 1e3 * min(values), 1e3 * max(values)

    def speedup_per_run(self, kind: str) -> tuple[float, ...]:
        """In order over `kind`, within each run."""
        return tuple(
            statistics.median(before) / statistics.median(after)
            for before, after in zip(self.in_order, getattr(self, kind), strict=True)
        )


@dataclass
class StartUp:
    """How long things take that happen once, in seconds."""

    parallelize_s: float = math.nan
    first_run_s: float = math.nan
    second_run_s: float = math.nan


@dataclass(frozen=True)
class StepResult:
    """`ceiling`: speed-up of as many processes as devices, each running the whole forward at the same time,
    where `groups` share the batch with one group's part of it, with `guidance_refresh` as many halves as it
    leaves of a step; `all_threads_ratio`: of one process with
    all those threads. `bytes_per_step`: sent by all devices in a steady step; `expected_bytes_per_step`:
    what the graph says. Spreads are (lowest, highest).
    """

    arch: str
    size: int
    dtype: str
    channels_last: bool
    devices: tuple[str, ...]
    kind: str
    num_stages: int
    stride: int
    forecast: str
    freshness: str
    groups: int
    guidance_refresh: int
    runs: int
    steps: int
    ms_per_step_in_order: float
    ms_per_step: float
    ratio: float
    ceiling: float
    all_threads_ratio: float
    ms_in_order_spread: tuple[float, float]
    ms_spread: tuple[float, float]
    ratio_per_run: tuple[float, ...]
    ceiling_per_run: tuple[float, ...]
    bytes_per_step: int
    expected_bytes_per_step: int
    weight_share: tuple[float, ...]
    weight_bytes: tuple[int, ...]
    resident_bytes: tuple[int, ...]
    compute_ms: tuple[float, ...]
    wait_ms: tuple[float, ...]
    balance: float
    parallelize_s: float
    first_run_s: float
    second_run_s: float
    idle_cpu_percent: tuple[float, ...]
    environment: dict[str, Any]
    command: str

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain JSON values."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()
        }

    def rows(self) -> list[tuple[str, str, str]]:
        """(what, value, note) for a table."""
        threads = len(self.devices)
        mb = 1e6
        return [
            ("in order, one core", f"{self.ms_per_step_in_order:.1f} ms", _spread(self.ms_in_order_spread)),
            (f"asyncdiff, {threads} devices", f"{self.ms_per_step:.1f} ms", _spread(self.ms_spread)),
            ("ratio", f"{self.ratio:.3f}", _per_run(self.ratio_per_run)),
            (
                "ceiling of this machine",
                f"{self.ceiling:.3f}",
                f"{threads} processes, each the whole forward{self._of_part}, at once",
            ),
            (
                f"one process, {threads} threads",
                f"{self.all_threads_ratio:.3f}",
                "the honest alternative on one CPU; not to be had with several GPUs",
            ),
            (
                "balance of the partition",
                f"{self.balance:.3f}",
                f"a {self.kind} split; largest stage x N / sum of measured blocks, 1 is perfect",
            ),
            (
                "sent per step",
                f"{self.bytes_per_step / mb:.3f} MB",
                f"the graph says {self.expected_bytes_per_step / mb:.3f}",
            ),
            (
                "weights per device",
                _list(100 * share for share in self.weight_share) + " %",
                "of the denoiser's",
            ),
            (
                "resident memory",
                _list(value / mb for value in self.resident_bytes) + " MB",
                "each process, imports included",
            ),
            ("compute per step", _list(self.compute_ms) + " ms", "each device"),
            ("waiting per step", _list(self.wait_ms) + " ms", "each device, for states"),
            ("parallelize()", f"{self.parallelize_s:.1f} s", "starts the workers"),
            ("first run", f"{self.first_run_s:.1f} s", "analysis and shipping of weights included"),
            ("second run", f"{self.second_run_s:.1f} s", f"{self.steps + _WARMUP_STEPS} steps"),
            ("idle workers", _list(self.idle_cpu_percent) + " % CPU", f"over {_IDLE_S:.0f} s"),
        ]

    @property
    def _of_part(self) -> str:
        if self.guidance_refresh > 1:
            return f" of half the batch, {self.guidance_refresh + 1} for {self.guidance_refresh} steps"
        return f" of 1/{self.groups} of the batch" if self.groups > 1 else ""


def run_step(
    *,
    arch: str,
    size: int,
    dtype: str,
    channels_last: bool = False,
    devices: Sequence[str],
    num_stages: int,
    stride: int = 1,
    forecast: str = "latents",
    freshness: str = "auto",
    guidance: str = "together",
    guidance_refresh: int = 1,
    time_shift: bool = False,
    runs: int = 3,
    steps: int = 8,
    progress: Progress = no_progress,
) -> StepResult:
    """Measure; `steps` timed steps in each of `runs` runs of every kind, interleaved.

    `num_stages`: of each group, of which there are as many as `guidance` makes of the devices. On CPU devices
    every process has one core.
    """
    architecture = architecture_named(arch)  # before any process is started
    workload = Workload(arch, None, size, dtype, channels_last=channels_last)
    groups = settle_groups(len(devices), num_stages, stride, guidance)
    settings = Settings(
        num_stages,
        stride,
        _WARMUP_STEPS,
        time_shift,
        forecast,
        freshness,
        groups=groups,
        guidance_refresh=guidance_refresh,
    )
    num_parts = 2 if guidance_refresh > 1 else groups
    if architecture.batch % num_parts:
        raise ConfigurationError(
            f"{arch} is called with a batch of {architecture.batch}: no guidance to split or refresh."
        )
    part = replace(workload, batch=architecture.batch // num_parts)
    rival_devices = devices if num_parts > 1 else devices[1:]
    check_room(workload, [devices[0], devices[0], *rival_devices])
    start_up = StartUp()
    with ExitStack() as stack:
        stack.enter_context(freed_memory_kept())  # as in workers
        progress("Building the denoisers", 0, 0)
        subject = load(workload, devices[0])  # first: what cannot be loaded is said once
        whole_bytes = denoiser_bytes(subject)
        whole = stack.enter_context(WholeModelProcess(workload, devices[0]))
        rivals = [stack.enter_context(WholeModelProcess(part, device)) for device in rival_devices]
        for each in (whole, *rivals):
            each.wait_ready()
        progress("Timing the blocks", 0, 0)
        chosen = _profiled_plan(subject, devices, settings)
        progress("Starting the workers", 0, 0)
        start = time.perf_counter()
        handle = stack.enter_context(parallelize(subject.pipe, list(devices), plan=chosen))
        start_up.parallelize_s = time.perf_counter() - start
        progress("First run", 0, 0)
        start_up.first_run_s = run_timed(subject, steps + _WARMUP_STEPS).seconds
        start_up.second_run_s = run_timed(subject, steps + _WARMUP_STEPS).seconds
        if num_parts == 1:
            rivals.insert(0, whole)
        samples, last_run = _measure(subject, whole, rivals, settings, steps, runs, progress)
        report = handle.last_run
        progress("Watching idle workers", 0, 0)
        idle = _idle_cpu(handle)
    period = _period(settings)
    first_step = Configuration(num_stages, period).first_steady_step(_WARMUP_STEPS)
    steady = steady_rounds(report, last_run, first_step, period)
    predictions = chosen.predictions
    assert predictions is not None
    return StepResult(
        arch=arch,
        size=size,
        dtype=dtype,
        channels_last=channels_last,
        devices=tuple(devices),
        kind=chosen.kind,
        num_stages=num_stages,
        stride=stride,
        forecast=forecast,
        freshness=freshness,
        groups=groups,
        guidance_refresh=guidance_refresh,
        runs=runs,
        steps=steps,
        ms_per_step_in_order=samples.median_ms("in_order"),
        ms_per_step=samples.median_ms("asynchronous"),
        ratio=samples.median_ms("in_order") / samples.median_ms("asynchronous"),
        ceiling=_ceiling(samples.median_ms("in_order"), samples.median_ms("together"), settings),
        all_threads_ratio=samples.median_ms("in_order") / samples.median_ms("all_threads"),
        ms_in_order_spread=samples.spread_ms("in_order"),
        ms_spread=samples.spread_ms("asynchronous"),
        ratio_per_run=samples.speedup_per_run("asynchronous"),
        ceiling_per_run=tuple(
            _ceiling(statistics.median(before), statistics.median(together), settings)
            for before, together in zip(samples.in_order, samples.together, strict=True)
        ),
        bytes_per_step=round(sum(each.bytes_sent for each in steady) / (period * len(steady))),
        expected_bytes_per_step=round(expected_bytes_per_step(chosen)),
        weight_share=tuple(held / whole_bytes for held in report.weight_bytes),
        weight_bytes=report.weight_bytes,
        resident_bytes=report.resident_bytes,
        compute_ms=median_ms_per_step(steady, "compute_s", period),
        wait_ms=median_ms_per_step(steady, "wait_s", period),
        balance=predictions.balance,
        parallelize_s=start_up.parallelize_s,
        first_run_s=start_up.first_run_s,
        second_run_s=start_up.second_run_s,
        idle_cpu_percent=idle,
        environment=describe_environment(),
        command=" ".join(["asyncdiff", *sys.argv[1:]]),
    )


def _period(settings: Settings) -> int:
    """After how many steps everything is as before: those of a round, or from refresh to refresh."""
    return max(settings.stride, settings.guidance_refresh)


def _ceiling(in_order: float, together: float, settings: Settings) -> float:
    """The speed-up where nobody waits. `in_order`: a whole forward alone; `together`: those of all processes
    at once, each of a part of the batch. One device evaluates both halves of guidance at once where it does
    evaluate both."""
    k = settings.guidance_refresh
    if k == 1:
        return settings.group_size * in_order / together
    if settings.group_size == 1:
        return k * in_order / (in_order + (k - 1) * together)
    return settings.group_size * k * in_order / ((k + 1) * together)


def _profiled_plan(subject: Subject, devices: Sequence[str], settings: Settings) -> Plan:
    chosen = plan(
        subject.pipe,
        list(devices),
        num_stages=settings.num_stages,
        stride=settings.stride,
        warmup_steps=settings.warmup_steps,
        time_shift=settings.time_shift,
        forecast=settings.forecast,
        freshness=settings.freshness,
        guidance="split" if settings.groups > 1 else "together",
        guidance_refresh=settings.guidance_refresh,
        profile=True,
        example=subject.example,
    )
    return replace(chosen, threads_per_device=1)  # as in order, also where there are more cores than devices


def _measure(
    subject: Subject,
    whole: WholeModelProcess,
    rivals: Sequence[WholeModelProcess],
    settings: Settings,
    steps: int,
    runs: int,
    progress: Progress,
) -> tuple[Samples, TimedRun]:
    """Every kind once per run, one after the other: a machine that drifts drifts under all of them. With it
    the last run on all devices."""
    period = _period(settings)
    samples, rhythm = Samples(), Configuration(settings.num_stages, period)
    first_step = rhythm.first_steady_step(_WARMUP_STEPS)
    for each in {whole, *rivals}:
        each.measure(1)  # untimed
    for run in range(runs):
        progress("Measuring", run, runs)
        samples.in_order.append(whole.measure(steps).step_seconds())
        last_run = run_timed(subject, rhythm.run_with_rounds(-(-steps // period), _WARMUP_STEPS))
        samples.asynchronous.append(last_run.round_seconds(first_step, period))
        together = measure_together(rivals, steps)
        samples.together.append([second for each in together for second in each.step_seconds()])
        samples.all_threads.append(whole.measure(steps, threads=len(rivals)).step_seconds())
    return samples, last_run


def _idle_cpu(handle: Handle) -> tuple[float, ...]:
    """Percent of one core that each worker uses while nothing is asked of it."""
    before, start = handle.last_run.cpu_s, time.perf_counter()
    time.sleep(_IDLE_S)
    elapsed, after = time.perf_counter() - start, handle.last_run.cpu_s
    return tuple(100 * (late - early) / elapsed for early, late in zip(before[1:], after[1:], strict=True))


def _spread(spread: tuple[float, float]) -> str:
    return f"{spread[0]:.1f} to {spread[1]:.1f} ms"


def _per_run(values: Sequence[float]) -> str:
    return "per run " + ", ".join(f"{value:.3f}" for value in values)


def _list(values: Any) -> str:
    return " / ".join(f"{value:.1f}" for value in values)
