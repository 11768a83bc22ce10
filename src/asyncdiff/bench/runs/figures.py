"""The figures of a benchmark as values, and what is computed from measured seconds. No torch."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Spread:
    """A figure measured several times. `per_run`: its median in each run."""

    median: float
    lowest: float
    highest: float
    per_run: tuple[float, ...]

    @classmethod
    def of(cls, runs: Sequence[Sequence[float]]) -> Spread:
        """`runs`: the values seen in each run; median, lowest and highest are over all of them."""
        values = list(itertools.chain(*runs))
        per_run = tuple(statistics.median(run) for run in runs)
        return cls(statistics.median(values), min(values), max(values), per_run)

    @classmethod
    def of_ratios(cls, before: Spread, after: Spread, factor: float = 1.0) -> Spread:
        """Of `factor * before / after` within each run: what drifts from run to run drops out."""
        return cls.of([[factor * a / b] for a, b in zip(before.per_run, after.per_run, strict=True)])


@dataclass(frozen=True)
class Timing:
    """`run_s`: whole calls, in seconds. `step_s`: steps, of an asynchronous run those of its steady state."""

    run_s: Spread
    step_s: Spread


@dataclass(frozen=True)
class InOrder:
    """The untouched model in one process, on one device. `device_peak_bytes`: 0 without CUDA."""

    timing: Timing
    weight_bytes: int
    resident_bytes: int
    device_peak_bytes: int


@dataclass(frozen=True)
class MachineLimit:
    """What the machine can do on `devices` devices. `ceiling`: speed-up of as many processes that each run
    the whole model at the same time. `all_threads`: of one process with the cores of all devices, where they
    are CPUs.
    """

    devices: int
    ceiling: Spread
    all_threads: Spread | None


@dataclass(frozen=True)
class TimelineSpan:
    """`category`: "compute", "wait" or "transfer"; waits and transfers lie within computes. Milliseconds
    since the stretch began."""

    rank: int
    name: str
    category: str
    start_ms: float
    end_ms: float


@dataclass(frozen=True)
class DeviceFigures:
    """One device of a configuration. Times are medians of the steady rounds, in milliseconds per step;
    `other_ms` is what is left of a step: between rounds, on the driver's device also the noise scheduler and
    guidance.
    """

    device: str
    compute_ms: float
    wait_ms: float
    send_ms: float
    other_ms: float
    weight_bytes: int
    weight_share: float
    resident_bytes: int
    device_peak_bytes: int


@dataclass(frozen=True)
class ConfigurationFigures:
    """One configuration. `step_speedup`, `run_speedup`: against in order, within each run.

    `ideal_step_speedup`: of the partition, from the measured seconds of its blocks, transfers free.
    `machine_step_speedup`: N times S times what of each device is left when all compute at once; for S = 1
    that is the machine's ceiling. `ideal_run_speedup`, `machine_run_speedup`: what these make of a whole call
    with its warm-up. `overhead_ms`: step time beyond the slowest device's compute, (median, 90th percentile).
    `balance`: largest stage x N / sum, 1 is perfect. `start_up_s`: `parallelize` and the first short run.
    """

    name: str
    num_stages: int
    stride: int
    kind: str
    balance: float
    timing: Timing
    step_speedup: Spread
    run_speedup: Spread
    ideal_step_speedup: float
    machine_step_speedup: float
    ideal_run_speedup: float
    machine_run_speedup: float
    overhead_ms: tuple[float, float]
    bytes_per_step: float
    expected_bytes_per_step: float
    start_up_s: float
    devices: tuple[DeviceFigures, ...]
    timeline: tuple[TimelineSpan, ...]

    @property
    def step_share(self) -> float:
        """Of what the machine allows."""
        return self.step_speedup.median / self.machine_step_speedup

    @property
    def run_share(self) -> float:
        """Of what machine and warm-up allow."""
        return self.run_speedup.median / self.machine_run_speedup


@dataclass(frozen=True)
class Skipped:
    """A configuration that this model refuses."""

    name: str
    reason: str


@dataclass(frozen=True)
class ComparisonFigures:
    """Another way to be faster. `relative_error`: of the final latents against in order (L2). Without figures
    where it is not available."""

    name: str
    devices: int
    settings: str
    run_s: Spread | None
    run_speedup: Spread | None
    relative_error: float | None
    not_available: str | None


@dataclass(frozen=True)
class BenchResult:
    """Everything that was measured and everything that a report shows. `steps`: as asked for."""

    title: str
    workload: dict[str, Any]
    devices: tuple[str, ...]
    threads_per_device: int | None
    warmup_steps: int
    steps: int
    runs: int
    in_order: InOrder
    limits: tuple[MachineLimit, ...]
    configurations: tuple[ConfigurationFigures, ...]
    skipped: tuple[Skipped, ...]
    comparisons: tuple[ComparisonFigures, ...]
    environment: dict[str, Any]
    command: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, with the shares of what the machine allows."""
        values = asdict(self)
        for written, figures in zip(values["configurations"], self.configurations, strict=True):
            written |= {"step_share": figures.step_share, "run_share": figures.run_share}
        return values


def whole_run_speedup(
    run_s: float, step_s: float, num_steps: int, warmup_steps: int, step_speedup: float
) -> float:
    """What a call of `run_s` seconds gains when its steps after the warm-up, `step_s` each, become
    `step_speedup` times as fast; warm-up, text encoder and VAE take as long as before.
    """
    others_s = max(0.0, run_s - num_steps * step_s)
    after_s = others_s + step_s * (warmup_steps + (num_steps - warmup_steps) / step_speedup)
    return (others_s + step_s * num_steps) / after_s


def machine_step_speedup(num_stages: int, stride: int, ceiling: float, num_devices: int) -> float:
    """A perfect split makes a step `num_stages * stride` times as fast on devices that do not slow each other
    down; `ceiling / num_devices` is what of one is left when all compute at once."""
    return num_stages * stride * ceiling / num_devices


def percentile(values: Sequence[float], percent: int) -> float:
    """With few values between them."""
    if len(values) < 2:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
