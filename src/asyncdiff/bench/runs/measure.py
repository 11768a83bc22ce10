"""Measuring: every kind of run once per round, one after the other, so that a machine that drifts drifts
under all of them.

In order is measured where the driver is, with the weights that were divided: one copy of the denoiser less in
memory than beside a process for it.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import torch

from asyncdiff.bench.comparisons import Comparison, ComparisonRun, comparisons_for
from asyncdiff.bench.configurations import Configuration
from asyncdiff.bench.environment import describe_environment
from asyncdiff.bench.progress import Progress, no_progress
from asyncdiff.bench.room import check_room
from asyncdiff.bench.runs.figures import (
    BenchResult,
    ComparisonFigures,
    ConfigurationFigures,
    DeviceFigures,
    InOrder,
    MachineLimit,
    Skipped,
    Spread,
    TimelineSpan,
    Timing,
    machine_step_speedup,
    percentile,
    whole_run_speedup,
)
from asyncdiff.bench.steady import (
    SteadyRound,
    calls_per_step,
    expected_bytes_per_step,
    median_ms_per_step,
    steady_rounds,
)
from asyncdiff.bench.threads import intra_op_threads
from asyncdiff.bench.timed_run import TimedRun
from asyncdiff.bench.whole_model import WholeModelProcess, measure_together
from asyncdiff.bench.workload import Subject, Workload, denoiser_bytes, load, run_timed
from asyncdiff.config import available_cores
from asyncdiff.errors import AsyncDiffError, ConfigurationError
from asyncdiff.pipeline import Handle, Plan, RunReport, parallelize, plan
from asyncdiff.runtime.allocator import freed_memory_kept
from asyncdiff.runtime.executor import device_peak_bytes_of_process, resident_bytes_of_process
from asyncdiff.simulation import COMPUTE, Timeline

_UNTIMED_STEPS = 2
_LIMIT_STEPS = 8  # of the runs that only tell what a step can be
_TIMELINE_ROUNDS = 3


def run_bench(
    workload: Workload,
    devices: Sequence[str],
    configurations: Sequence[Configuration],
    *,
    warmup_steps: int = 1,
    steps: int = 20,
    runs: int = 3,
    skip_refused: bool = False,
    compare: bool = False,
    progress: Progress = no_progress,
) -> BenchResult:
    """Measure `runs` calls of `steps` steps in order and in each configuration, after untimed ones.

    A configuration takes the first of the devices. CPU devices share the cores evenly, in order on one share.
    `skip_refused`: leave out what the model refuses instead of raising. `compare`: diffusers' own ways too.
    """
    threads, on_cpu = _threads_per_device(devices), all(torch.device(name).type == "cpu" for name in devices)
    most = max(each.num_devices for each in configurations)
    check_room(workload, devices[:most])
    with ExitStack() as stack:
        stack.enter_context(intra_op_threads(threads))
        stack.enter_context(freed_memory_kept())  # as in workers
        progress(f"Loading {workload.arch or workload.model}", 0, 0)
        subject = load(workload, devices[0])  # first: what cannot be loaded is said once, and downloaded once
        whole_bytes = denoiser_bytes(subject)
        others = [stack.enter_context(WholeModelProcess(workload, device)) for device in devices[1:most]]
        for other in others:
            other.wait_ready()
        installed = stack.enter_context(_Installed(subject))
        progress("Untimed runs in order", 0, 0)
        measure_together(others, _UNTIMED_STEPS, threads, partial(run_timed, subject))
        resident_bytes, peak_bytes = resident_bytes_of_process(), device_peak_bytes_of_process()
        ways, skipped = _prepare(
            installed, configurations, devices, warmup_steps, threads, skip_refused, progress
        )
        comparisons = comparisons_for(subject.pipe, devices, threads) if compare else []
        rounds = _Rounds(installed, others, ways, comparisons, threads, on_cpu, steps, progress)
        for run in range(runs):
            rounds.run(run, runs)
    in_order = InOrder(_timing(rounds.in_order), whole_bytes, resident_bytes, peak_bytes)
    limits = _limits(rounds, in_order)
    return BenchResult(
        title=workload.title,
        workload=asdict(workload),
        devices=tuple(devices),
        threads_per_device=threads,
        warmup_steps=warmup_steps,
        steps=steps,
        runs=runs,
        in_order=in_order,
        limits=limits,
        configurations=tuple(_configuration_figures(way, in_order, limits, warmup_steps) for way in ways),
        skipped=tuple(skipped),
        comparisons=tuple(
            _comparison_figures(each, measured, in_order)
            for each, measured in zip(comparisons, rounds.compared, strict=True)
        ),
        environment=describe_environment(),
        command=" ".join(["asyncdiff", *sys.argv[1:]]),
    )


def _threads_per_device(devices: Sequence[str]) -> int | None:
    """The share of the cores that a CPU device gets, the same in every configuration; None without two."""
    num_cpu = sum(torch.device(name).type == "cpu" for name in devices)
    return max(1, available_cores() // num_cpu) if num_cpu > 1 else None


@dataclass
class _Way:
    """A configuration, its plan, and what was measured of it."""

    configuration: Configuration
    plan: Plan
    start_up_s: float
    first_steady_step: int
    runs: list[TimedRun] = field(default_factory=list)
    rounds: list[SteadyRound] = field(default_factory=list)
    report: RunReport | None = None

    def note(self, run: TimedRun, report: RunReport) -> None:
        if len(run.step_ends) != len(report.steps):
            raise AsyncDiffError(
                f"The pipeline told of {len(run.step_ends)} steps, but its denoiser ran {len(report.steps)}: "
                "this pipeline cannot be timed by steps."
            )
        self.runs.append(run)
        self.report = report
        self.rounds += steady_rounds(report, run, self.first_steady_step, self.configuration.stride)


class _Installed:
    """The subject, whole or divided in one way: each takes the weights from the one before."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._plan: Plan | None = None
        self._handle: Handle | None = None

    def use(self, plan: Plan, untimed_steps: int) -> float:
        """Divide it so, with an untimed run; the seconds that took. Nothing is done if it is divided so."""
        if self._plan is plan:
            return 0.0
        self.remove()
        start = time.perf_counter()
        self._handle = parallelize(self.subject.pipe, list(plan.devices), plan=plan)
        run_timed(self.subject, untimed_steps)
        self._plan = plan
        if self.subject.device.type == "cuda":  # until here it has held the whole denoiser
            torch.cuda.reset_peak_memory_stats(self.subject.device)
        return time.perf_counter() - start

    def measure(self, steps: int) -> tuple[TimedRun, RunReport]:
        assert self._handle is not None
        return run_timed(self.subject, steps), self._handle.last_run

    def make_whole(self) -> None:
        """Put it together again, with an untimed run; nothing is done if it is whole."""
        if self._handle is not None:
            self.remove()
            run_timed(self.subject, _UNTIMED_STEPS)

    def remove(self) -> None:
        handle, self._handle, self._plan = self._handle, None, None
        if handle is not None:
            handle.remove()

    def __enter__(self) -> _Installed:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def _prepare(
    installed: _Installed,
    configurations: Sequence[Configuration],
    devices: Sequence[str],
    warmup_steps: int,
    threads: int | None,
    skip_refused: bool,
    progress: Progress,
) -> tuple[list[_Way], list[Skipped]]:
    """The plan of each, tried out in a short run."""
    ways, skipped = [], []
    for each in configurations:
        try:
            installed.remove()
            progress(f"{each}: timing the blocks", 0, 0)
            chosen = _profiled_plan(installed.subject, each, devices, warmup_steps, threads)
            progress(f"{each}: dividing the denoiser, untimed run", 0, 0)
            start_up_s = installed.use(chosen, each.shortest_run(warmup_steps))
        except ConfigurationError as error:
            if not skip_refused:
                raise
            skipped.append(Skipped(str(each), str(error)))
        else:
            ways.append(_Way(each, chosen, start_up_s, each.first_steady_step(warmup_steps)))
    if not ways:
        reasons = " ".join(f"{each.name}: {each.reason}" for each in skipped)
        raise ConfigurationError(f"This model refuses every configuration. {reasons}")
    return ways, skipped


def _profiled_plan(
    subject: Subject,
    configuration: Configuration,
    devices: Sequence[str],
    warmup_steps: int,
    threads: int | None,
) -> Plan:
    chosen = plan(
        subject.pipe,
        list(devices[: configuration.num_devices]),
        num_stages=configuration.num_stages,
        stride=configuration.stride,
        warmup_steps=warmup_steps,
        profile=True,
        example=subject.example,
    )
    # Fewer devices than there are would share the cores among fewer, which in order does not get either.
    return replace(chosen, threads_per_device=threads)


class _Rounds:
    """Runs of every kind, in turn."""

    def __init__(
        self,
        installed: _Installed,
        others: Sequence[WholeModelProcess],
        ways: Sequence[_Way],
        comparisons: Sequence[Comparison],
        threads: int | None,
        on_cpu: bool,
        steps: int,
        progress: Progress,
    ) -> None:
        self._installed = installed
        self._others = others
        self._ways = ways
        self._comparisons = comparisons
        self._threads = threads
        self._on_cpu = on_cpu
        self._steps = steps
        self._limit_steps = min(steps, _LIMIT_STEPS)
        self._progress = progress
        self._done = 0
        self.counts = sorted({way.configuration.num_devices for way in ways})
        self.in_order: list[TimedRun] = []
        self.together: dict[int, list[list[TimedRun]]] = {count: [] for count in self.counts}
        self.all_threads: dict[int, list[TimedRun]] = {count: [] for count in self.counts}
        self.compared: list[list[ComparisonRun]] = [[] for _ in comparisons]

    def run(self, run: int, runs: int) -> None:
        """One of each. Every other time backwards: what stands is measured before another takes its
        weights, and none is always the one after the same other.

        What a configuration could reach at most is measured right beside it: its share of that is to say
        how well it does, not how fast the machine was some minutes earlier.
        """
        total = runs * (1 + len(self._ways) + (1 + self._on_cpu) * len(self.counts) + len(self._comparisons))
        where = f"run {run + 1} of {runs}"
        if run % 2 == 0:
            self._run_divided(tuple(reversed(self._ways)), where, total)
            self._installed.make_whole()
            self._run_together(where, total)
            self._run_whole(where, total)
        else:
            self._installed.make_whole()
            self._run_whole(where, total)
            self._run_together(where, total)
            self._run_divided(self._ways, where, total)

    def _run_divided(self, ways: Sequence[_Way], where: str, total: int) -> None:
        for way in ways:
            self._tell(f"{way.configuration}, {where}", total)
            configuration, warmup_steps = way.configuration, way.plan.warmup_steps
            self._installed.use(way.plan, configuration.shortest_run(warmup_steps))
            way.note(*self._installed.measure(self._steps))

    def _run_together(self, where: str, total: int) -> None:
        for count in self.counts:
            self._tell(f"{count} whole models at once, {where}", total)
            others, here = self._others[: count - 1], partial(run_timed, self._installed.subject)
            self.together[count].append(measure_together(others, self._limit_steps, self._threads, here))

    def _run_whole(self, where: str, total: int) -> None:
        self._tell(f"In order, {where}", total)
        self.in_order.append(run_timed(self._installed.subject, self._steps))
        if self._on_cpu:
            for count in self.counts:
                self._run_all_threads(count, where, total)
        for comparison, measured in zip(self._comparisons, self.compared, strict=True):
            self._tell(f"{comparison.name}, {where}", total)
            measured.append(comparison.measure(self._steps))

    def _run_all_threads(self, count: int, where: str, total: int) -> None:
        threads = count * (self._threads or 1)
        self._tell(f"One process with {threads} threads, {where}", total)
        with intra_op_threads(threads):
            self.all_threads[count].append(run_timed(self._installed.subject, self._limit_steps))

    def _tell(self, what: str, total: int) -> None:
        self._progress(what, self._done, total)
        self._done += 1


# -- from runs to figures --


def _timing(runs: Sequence[TimedRun]) -> Timing:
    return Timing(
        Spread.of([[run.seconds] for run in runs]), Spread.of([run.step_seconds(1) for run in runs])
    )


def _limits(rounds: _Rounds, in_order: InOrder) -> tuple[MachineLimit, ...]:
    step_s = in_order.timing.step_s
    limits = []
    for count in rounds.counts:
        together = Spread.of(
            [[second for each in runs for second in each.step_seconds(1)] for runs in rounds.together[count]]
        )
        threads = rounds.all_threads[count]
        one_process = (
            Spread.of_ratios(step_s, Spread.of([run.step_seconds(1) for run in threads])) if threads else None
        )
        limits.append(MachineLimit(count, Spread.of_ratios(step_s, together, count), one_process))
    return tuple(limits)


def _configuration_figures(
    way: _Way, in_order: InOrder, limits: Sequence[MachineLimit], warmup_steps: int
) -> ConfigurationFigures:
    configuration, predictions, report = way.configuration, way.plan.predictions, way.report
    assert predictions is not None
    assert report is not None
    first, stride = way.first_steady_step, configuration.stride
    timing = Timing(
        Spread.of([[run.seconds] for run in way.runs]),
        Spread.of([run.round_seconds(first, stride) for run in way.runs]),
    )
    before = in_order.timing
    ceiling = next(limit.ceiling for limit in limits if limit.devices == configuration.num_devices)
    machine = machine_step_speedup(
        configuration.num_stages, stride, ceiling.median, configuration.num_devices
    )
    num_steps = len(way.runs[0].step_ends)
    ideal_run, machine_run = (
        whole_run_speedup(before.run_s.median, before.step_s.median, num_steps, warmup_steps, speedup)
        for speedup in (predictions.ideal_speedup, machine)
    )
    overheads_ms = [1e3 * each.overhead_s / stride for each in way.rounds]
    return ConfigurationFigures(
        name=str(configuration),
        num_stages=configuration.num_stages,
        stride=stride,
        kind=way.plan.kind,
        balance=predictions.balance,
        timing=timing,
        step_speedup=Spread.of_ratios(before.step_s, timing.step_s),
        run_speedup=Spread.of_ratios(before.run_s, timing.run_s),
        ideal_step_speedup=predictions.ideal_speedup,
        machine_step_speedup=machine,
        ideal_run_speedup=ideal_run,
        machine_run_speedup=machine_run,
        overhead_ms=(statistics.median(overheads_ms), percentile(overheads_ms, 90)),
        bytes_per_step=sum(each.bytes_sent for each in way.rounds) / (stride * len(way.rounds)),
        expected_bytes_per_step=expected_bytes_per_step(way.plan, calls_per_step(report)),
        start_up_s=way.start_up_s,
        devices=_device_figures(way, report, in_order.weight_bytes, stride),
        timeline=_steady_stretch(report.timeline, _TIMELINE_ROUNDS * stride * timing.step_s.median),
    )


def _device_figures(way: _Way, report: RunReport, whole_bytes: int, stride: int) -> tuple[DeviceFigures, ...]:
    compute, wait, send = (
        median_ms_per_step(way.rounds, name, stride) for name in ("compute_s", "wait_s", "send_s")
    )
    step_ms = 1e3 * statistics.median(each.seconds for each in way.rounds) / stride
    return tuple(
        DeviceFigures(
            device=device,
            compute_ms=compute[rank],
            wait_ms=wait[rank],
            send_ms=send[rank],
            other_ms=max(0.0, step_ms - compute[rank] - wait[rank] - send[rank]),
            weight_bytes=report.weight_bytes[rank],
            weight_share=report.weight_bytes[rank] / whole_bytes,
            resident_bytes=report.resident_bytes[rank],
            device_peak_bytes=report.device_peak_bytes[rank],
        )
        for rank, device in enumerate(report.devices)
    )


def _steady_stretch(timeline: Timeline, seconds: float) -> tuple[TimelineSpan, ...]:
    """The spans of so many seconds from the middle of a run on, where the driver begins a round."""
    starts = [span.start_s for span in timeline.spans if span.rank == 0 and span.category == COMPUTE]
    begin = max(start for start in starts if start <= max(timeline.total_s / 2, min(starts)))
    return tuple(
        TimelineSpan(
            span.rank,
            span.name,
            span.category,
            1e3 * max(0.0, span.start_s - begin),
            1e3 * min(seconds, span.end_s - begin),
        )
        for span in timeline.spans
        if span.end_s > begin and span.start_s < begin + seconds
    )


def _comparison_figures(
    comparison: Comparison, measured: Sequence[ComparisonRun], in_order: InOrder
) -> ComparisonFigures:
    refused = next((run.not_available for run in measured if run.not_available is not None), None)
    run_s = None if refused is not None else Spread.of([[run.seconds] for run in measured])
    return ComparisonFigures(
        name=comparison.name,
        devices=comparison.devices,
        settings=comparison.settings,
        run_s=run_s,
        run_speedup=None if run_s is None else Spread.of_ratios(in_order.timing.run_s, run_s),
        relative_error=measured[-1].relative_error,
        not_available=refused,
    )
