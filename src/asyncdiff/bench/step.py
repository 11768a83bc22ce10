"""Milliseconds of one denoising step: in order, asynchronously in the steady state, and what the machine can
do.

All in one run, interleaved, because only ratios measured side by side mean anything on a shared machine.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from asyncdiff.bench.architectures import DenoisingLoop, architecture_named, build_denoiser
from asyncdiff.bench.environment import describe_environment
from asyncdiff.bench.progress import Progress, no_progress
from asyncdiff.bench.whole_model import WholeModelProcess
from asyncdiff.pipeline import Handle, Plan, parallelize, plan

_WARMUP_STEPS = 1
_UNTIMED_STEPS = 2
_IDLE_S = 2.0


@dataclass
class Samples:
    """Seconds per step, all runs together, in the order measured."""

    in_order: list[float] = field(default_factory=list)
    all_threads: list[float] = field(default_factory=list)
    together: list[float] = field(default_factory=list)
    asynchronous: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class StepResult:
    """`ceiling`: speed-up of as many processes as devices, each running the whole forward at the same
    time; `all_threads_ratio`: of one process with all those threads. `bytes_per_step`: sent by all
    devices in a steady step; `expected_bytes_per_step`: what the graph says. Spreads are (lowest,
    highest).
    """

    arch: str
    size: int
    dtype: str
    devices: tuple[str, ...]
    num_stages: int
    stride: int
    forecast: str
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
                f"{threads} processes, each the whole forward, at once",
            ),
            (
                f"one process, {threads} threads",
                f"{self.all_threads_ratio:.3f}",
                "the honest alternative on one CPU; not to be had with several GPUs",
            ),
            (
                "balance of the partition",
                f"{self.balance:.3f}",
                "largest stage x N / sum, measured blocks; 1 is perfect",
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
            ("second run", f"{self.second_run_s:.1f} s", f"{self.steps} steps"),
            ("idle workers", _list(self.idle_cpu_percent) + " % CPU", f"over {_IDLE_S:.0f} s"),
        ]


def run_step(
    *,
    arch: str,
    size: int,
    dtype: str,
    devices: Sequence[str],
    num_stages: int,
    stride: int = 1,
    forecast: str = "linear",
    time_shift: bool = False,
    runs: int = 3,
    steps: int = 8,
    progress: Progress = no_progress,
) -> StepResult:
    """Measure; `steps` timed steps in each of `runs` runs of every kind, interleaved. CPU devices have one
    core each.
    """
    architecture, torch_dtype = architecture_named(arch), getattr(torch, dtype)
    samples, ratios, ceilings = Samples(), [], []
    with ExitStack() as stack:
        progress("Building the denoisers", 0, 0)
        wholes = [stack.enter_context(WholeModelProcess(arch, size, dtype)) for _ in devices]
        loop = DenoisingLoop(architecture, build_denoiser(architecture, torch_dtype), size, torch_dtype)
        for whole in wholes:
            whole.wait_ready()
        progress("Timing the blocks", 0, 0)
        split = {"num_stages": num_stages, "stride": stride, "forecast": forecast, "time_shift": time_shift}
        chosen = plan(
            loop,
            list(devices),
            warmup_steps=_WARMUP_STEPS,
            profile=True,
            example={"num_steps": 2},
            **split,  # type: ignore[arg-type]
        )
        whole_bytes = sum(parameter.nbytes for parameter in loop.denoiser.parameters())
        progress("Starting the workers", 0, 0)
        start = time.perf_counter()
        handle = stack.enter_context(parallelize(loop, list(devices), plan=chosen))
        parallelize_s = time.perf_counter() - start
        progress("First run", 0, 0)
        first_run_s = _seconds(loop, steps + _WARMUP_STEPS)
        for whole in wholes:
            whole.measure(1)
        second_run_s = float("nan")
        for run in range(runs):
            progress("Measuring", run, runs)
            in_order = wholes[0].measure(steps)
            start = time.perf_counter()
            asynchronous = _asynchronous_steps(loop, handle, steps, stride)
            second_run_s = time.perf_counter() - start if run == 0 else second_run_s
            for whole in wholes:
                whole.start(steps)
            together = [second for whole in wholes for second in whole.result()]
            samples.all_threads += wholes[0].measure(steps, threads=len(devices))
            samples.in_order += in_order
            samples.asynchronous += asynchronous
            samples.together += together
            ratios.append(statistics.median(in_order) / statistics.median(asynchronous))
            ceilings.append(len(devices) * statistics.median(in_order) / statistics.median(together))
        progress("Watching idle workers", 0, 0)
        report = handle.last_run
        idle = _idle_cpu(handle)
    steady = report.steps[_WARMUP_STEPS + _UNTIMED_STEPS : -1]
    predictions = chosen.predictions
    assert predictions is not None
    in_order_ms, ms = 1e3 * statistics.median(samples.in_order), 1e3 * statistics.median(samples.asynchronous)
    return StepResult(
        arch=arch,
        size=size,
        dtype=dtype,
        devices=tuple(devices),
        num_stages=num_stages,
        stride=stride,
        forecast=forecast,
        runs=runs,
        steps=steps,
        ms_per_step_in_order=in_order_ms,
        ms_per_step=ms,
        ratio=in_order_ms / ms,
        ceiling=len(devices) * in_order_ms / (1e3 * statistics.median(samples.together)),
        all_threads_ratio=in_order_ms / (1e3 * statistics.median(samples.all_threads)),
        ms_in_order_spread=(1e3 * min(samples.in_order), 1e3 * max(samples.in_order)),
        ms_spread=(1e3 * min(samples.asynchronous), 1e3 * max(samples.asynchronous)),
        ratio_per_run=tuple(ratios),
        ceiling_per_run=tuple(ceilings),
        bytes_per_step=round(sum(step.bytes_sent for step in steady) / len(steady)),
        expected_bytes_per_step=round(
            predictions.crossing_bytes_per_step + _prediction_bytes_per_step(loop, chosen)
        ),
        weight_share=tuple(held / whole_bytes for held in report.weight_bytes),
        weight_bytes=report.weight_bytes,
        resident_bytes=report.resident_bytes,
        compute_ms=_per_device(steady, "compute_s"),
        wait_ms=_per_device(steady, "wait_s"),
        balance=predictions.balance,
        parallelize_s=parallelize_s,
        first_run_s=first_run_s,
        second_run_s=second_run_s,
        idle_cpu_percent=idle,
        environment=describe_environment(),
        command=" ".join(["asyncdiff", *sys.argv[1:]]),
    )


def _asynchronous_steps(loop: DenoisingLoop, handle: Handle, steps: int, stride: int) -> list[float]:
    """Seconds per step in the steady state: of whole rounds, without the warm-up, what follows it, and the
    last.
    """
    total = _WARMUP_STEPS + _UNTIMED_STEPS * stride + -(-steps // stride) * stride + 1
    ends: list[float] = []
    loop(total, lambda step: ends.append(time.perf_counter()))
    first = _WARMUP_STEPS + _UNTIMED_STEPS * stride - 1
    rounds = ends[first : total - 1 : stride]
    return [(after - before) / stride for before, after in itertools.pairwise(rounds)]


def _seconds(loop: DenoisingLoop, steps: int) -> float:
    start = time.perf_counter()
    loop(steps)
    return time.perf_counter() - start


def _idle_cpu(handle: Handle) -> tuple[float, ...]:
    """Percent of one core that each worker uses while nothing is asked of it."""
    before, start = handle.last_run.cpu_s, time.perf_counter()
    time.sleep(_IDLE_S)
    elapsed, after = time.perf_counter() - start, handle.last_run.cpu_s
    return tuple(100 * (late - early) / elapsed for early, late in zip(before[1:], after[1:], strict=True))


def _prediction_bytes_per_step(loop: DenoisingLoop, chosen: Plan) -> float:
    """A prediction crosses unless the driver itself makes it: copy 0 of a nested split, or of a single
    stage.
    """
    driver_predicts = chosen.kind == "nested" or chosen.num_stages == 1
    crossing = chosen.stride - 1 if driver_predicts else chosen.stride
    return loop.prediction_bytes * crossing / chosen.stride


def _per_device(steps: Sequence[Any], name: str) -> tuple[float, ...]:
    return tuple(
        1e3 * statistics.median(getattr(device, name) for device in devices)
        for devices in zip(
            *(step.devices for step in steps if any(d.compute_s for d in step.devices)), strict=True
        )
    )


def _spread(spread: tuple[float, float]) -> str:
    return f"{spread[0]:.1f} to {spread[1]:.1f} ms"


def _per_run(values: Sequence[float]) -> str:
    return "per run " + ", ".join(f"{value:.3f}" for value in values)


def _list(values: Any) -> str:
    return " / ".join(f"{value:.1f}" for value in values)
