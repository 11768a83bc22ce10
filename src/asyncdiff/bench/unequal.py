"""A fast and a slow device: step times of an even split, and of the split for their speeds.

Two processes, each pinned to a core of its own; beside the second one runs a process that does nothing but
take half of the core. Linux only.

python -m asyncdiff.bench.unequal --arch sd21 --size 256 --json unequal.json
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asyncdiff.bench import command
from asyncdiff.errors import ConfigurationError

if TYPE_CHECKING:
    from asyncdiff.bench.architectures import DenoisingLoop
    from asyncdiff.planner import Plan

FIRST_STEP = 3
"""The first of the steady state: after a step in order and two that fill buffers."""

_DEVICES = ("cpu", "cpu")


@dataclass(frozen=True)
class SplitTime:
    """One split. `speeds`: what it was made for. `ideal_ms`: of its slower stage, from the measured time of
    its blocks on the fast core and the measured speed of the slow one. `ms_per_run`: median step of each run.
    """

    speeds: tuple[float, float]
    kind: str
    work_share: tuple[float, ...]
    ideal_ms: float
    ms_per_run: tuple[float, ...]

    @property
    def ms(self) -> float:
        return statistics.median(self.ms_per_run)


@dataclass(frozen=True)
class Unequal:
    """`slow_speed`: measured, of the second process with the whole denoiser, the first being 1."""

    arch: str
    size: int
    dtype: str
    in_order_ms: float
    slow_speed: float
    splits: tuple[SplitTime, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        splits = [
            asdict(split) | {"ms": split.ms, "speed_up": self.in_order_ms / split.ms} for split in self.splits
        ]
        return asdict(self) | {"splits": splits}

    def rows(self) -> list[list[str]]:
        """For the table."""
        rows = [
            ["in order on the fast core", "", f"{self.in_order_ms:.1f}", "1.00", "", ""],
            ["in order on the slow core", "", *self._times(self.in_order_ms / self.slow_speed), "", ""],
        ]
        for split in self.splits:
            shares = " / ".join(f"{share:.0%}" for share in split.work_share)
            title = f"{split.kind}, for speeds {split.speeds[0]:g} and {split.speeds[1]:g}"
            rows.append([title, shares, *self._times(split.ms), *self._times(split.ideal_ms)])
        return rows

    def _times(self, ms: float) -> list[str]:
        return [f"{ms:.1f}", f"{self.in_order_ms / ms:.2f}"]


def run_unequal(
    *, arch: str, size: int, dtype: str, speed: float, steps: int, runs: int, cores: tuple[int, int]
) -> Unequal:
    """Measure both splits, each in `runs` runs of `steps` steady steps, one split after the other per run.

    The even split is made as if both cores were alike, the other for speeds of 1 and `speed`.
    """
    import torch

    import asyncdiff
    from asyncdiff.bench.architectures import DenoisingLoop, architecture_named, build_denoiser
    from asyncdiff.runtime.allocator import freed_memory_kept

    torch.set_num_threads(1)
    fast, slow = cores
    torch_dtype, architecture = getattr(torch, dtype), architecture_named(arch)
    with _pinned_to(fast), _busy_core(slow), freed_memory_kept():  # as in workers
        loop = DenoisingLoop(architecture, build_denoiser(architecture, torch_dtype), size, torch_dtype)
        loop(2)
        in_order_ms = _step_ms(loop, steps, first=1)
        with _pinned_to(slow):
            slow_speed = in_order_ms / _step_ms(loop, steps, first=1)
        plans = {
            speeds: asyncdiff.plan(
                loop, list(_DEVICES), num_stages=2, profile=True, speeds=speeds, example={"num_steps": 2}
            )
            for speeds in ((1.0, 1.0), (1.0, speed))
        }
        times: dict[tuple[float, float], list[float]] = {speeds: [] for speeds in plans}
        for _ in range(runs):
            for speeds, plan in plans.items():
                times[speeds].append(_asynchronous_ms(loop, plan, steps, slow))
    splits = tuple(
        SplitTime(speeds, plan.kind, *_expected(plan, slow_speed), tuple(times[speeds]))
        for speeds, plan in plans.items()
    )
    return Unequal(arch, size, dtype, in_order_ms, slow_speed, splits)


def _asynchronous_ms(loop: DenoisingLoop, plan: Plan, steps: int, slow: int) -> float:
    from asyncdiff.pipeline import parallelize

    with _pinned_to(slow):  # a worker starts where whoever starts it is
        handle = parallelize(loop, list(_DEVICES), plan=plan)
    with handle:
        loop(FIRST_STEP + 1)
        return _step_ms(loop, steps, first=FIRST_STEP)


def _step_ms(loop: DenoisingLoop, steps: int, *, first: int) -> float:
    """Median over `steps` steps from `first` on. The last two, in which less is done, are left out."""
    from asyncdiff.bench.timed_run import StepEnds

    ends = StepEnds(loop.device)
    loop(first + steps + 2, lambda step: ends.mark())
    return 1e3 * statistics.median(ends.finish().round_seconds(first, 1))


def _expected(plan: Plan, slow_speed: float) -> tuple[tuple[float, ...], float]:
    """Each stage's share of the work, and the milliseconds of the slower one."""
    assert plan.predictions is not None
    speeds = plan.predictions.speeds or (1.0, 1.0)
    work_s = [own * speed for own, speed in zip(plan.predictions.stage_seconds, speeds, strict=True)]
    return tuple(own / sum(work_s) for own in work_s), 1e3 * max(work_s[0], work_s[1] / slow_speed)


@contextmanager
def _pinned_to(core: int) -> Iterator[None]:
    """This process with all its threads on one core; then on those it had."""
    before = os.sched_getaffinity(0)
    _pin({core})
    try:
        yield
    finally:
        _pin(before)


def _pin(cores: set[int]) -> None:
    import psutil

    for thread in psutil.Process().threads():
        with suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(thread.id, cores)


@contextmanager
def _busy_core(core: int) -> Iterator[None]:
    """With another process that takes what it can get of a core, which is half where one other wants it.

    In a session of its own, as workers have: Linux divides a core first among sessions (autogroups), and one
    whose processes are busy on several cores has less of each.
    """
    spin = f"import os\nos.sched_setaffinity(0, {{{core}}})\nwhile os.getppid() == {os.getpid()}: pass"
    with subprocess.Popen([sys.executable, "-c", spin], start_new_session=True) as process:
        try:
            yield
        finally:
            process.kill()


def two_cores() -> tuple[int, int]:
    """Two cores that this process may use; `ConfigurationError` where there are not two, or no choice."""
    if not hasattr(os, "sched_setaffinity"):
        raise ConfigurationError("This measurement pins processes to cores, which needs Linux.")
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise ConfigurationError("This measurement needs two cores, but this process may use one.")
    return cores[0], cores[1]


def unequal(
    arch: Annotated[
        str, typer.Option(help="Denoiser, built with random weights: sd15, sd21, sdxl ...")
    ] = "sd21",
    size: Annotated[int, typer.Option(metavar="PIXELS", help="Height and width of the picture.")] = 256,
    dtype: command.TimedDtypeOption = "auto",
    speed: Annotated[float, typer.Option(help="Of the slow core, as the split is made for it.")] = 0.5,
    steps: Annotated[int, typer.Option(help="Timed steps of a run.")] = 8,
    runs: Annotated[int, typer.Option(help="Times everything is measured.")] = 3,
    json_file: command.JsonOption = None,
) -> None:
    """Step times on a fast and a slow core: of an even split, and of the split for their speeds."""
    command.check_at_least("--steps", steps, 1)
    command.check_at_least("--runs", runs, 1)
    if not 0 < speed <= 1:
        raise ConfigurationError(f"--speed {speed:g}: must be above 0, and 1 at most.")
    dtype = command.timed_dtype(dtype, _DEVICES)
    result = run_unequal(
        arch=arch, size=size, dtype=dtype, speed=speed, steps=steps, runs=runs, cores=two_cores()
    )
    command.show_table(
        f"{arch}, {size} px, {dtype}; the slow core does {result.slow_speed:.2f} of the fast one",
        ["split", "work", "ms per step", "speed-up", "ideal ms", "ideal"],
        result.rows(),
    )
    command.finish("unequal", {"steps": steps, "runs": runs} | result.to_json(), json_file)


if __name__ == "__main__":
    command.run_command(unequal)
