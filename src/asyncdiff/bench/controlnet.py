"""What a device for the ControlNet brings, over leaving it in the driver before the denoiser.

Per repetition the blocks and the ControlNet are timed and the machine's ceiling is measured, from which steps
are predicted for up to three devices; then the ways for one and two devices are run in turn.

python -m asyncdiff.bench.controlnet --arch controlnet-sdxl --size 256 --dtype bfloat16
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asyncdiff.bench import command
from asyncdiff.bench.progress import Progress, no_progress

if TYPE_CHECKING:
    from asyncdiff.bench.link import LinkSpeed
    from asyncdiff.bench.whole_model import WholeModelProcess
    from asyncdiff.bench.workload import Subject
    from asyncdiff.graph import BlockKey
    from asyncdiff.pipeline.examination import Examination
    from asyncdiff.planner import ControlNetCost, Plan
    from asyncdiff.simulation import Machine

_WARMUP_STEPS = 1
_FIRST_STEADY = _WARMUP_STEPS + 2
_UNTIMED_STEPS = 5
_CEILING_STEPS = 4


@dataclass(frozen=True)
class Way:
    """How devices are used: `num_stages` and `groups` of the denoiser's, and `controlnet` as `parallelize`
    takes it."""

    num_stages: int
    groups: int
    controlnet: str

    @property
    def num_devices(self) -> int:
        return self.num_stages * self.groups + (self.controlnet != "serial")

    @property
    def title(self) -> str:
        denoiser = "two halves of guidance" if self.groups > 1 else f"{self.num_stages} stages"
        where = "in the driver" if self.controlnet == "serial" else f"{self.controlnet}, on its own"
        return f"{'whole' if self.num_stages * self.groups == 1 else denoiser}; ControlNet {where}"


WAYS = (
    Way(1, 1, "serial"), Way(2, 1, "serial"), Way(1, 2, "serial"), Way(3, 1, "serial"),
    Way(1, 1, "overlap"), Way(1, 1, "ahead"),
    Way(2, 1, "overlap"), Way(2, 1, "ahead"), Way(1, 2, "overlap"), Way(1, 2, "ahead"),
)  # fmt: skip
_HEADS = ["denoiser", "devices", "predicted", "over 1", "over serial", "measured", "over 1"]
MEASURED = tuple(way for way in WAYS if way.num_devices <= 2)


@dataclass(frozen=True)
class Repetition:
    """Milliseconds of one call of each, of the driver's own work per step, and of a step by each way.
    `busy_speed`: what part of its speed a device keeps while another is at work."""

    denoiser_ms: float
    read_after_ms: float
    controlnet_ms: float
    driver_ms: float
    busy_speed: float
    predicted_ms: dict[str, float]
    measured_ms: dict[str, float]


@dataclass(frozen=True)
class ControlNetBenchmark:
    """`links`: measured beforehand, once; the slowest counts. `output_bytes`: what the ControlNet returns at
    every step."""

    arch: str
    size: int
    dtype: str
    devices: tuple[str, ...]
    steps: int
    output_bytes: int
    links: tuple[LinkSpeed, ...]
    repetitions: tuple[Repetition, ...]

    def predicted_ms(self, way: Way) -> float | None:
        """Median over the repetitions; None for what has no plan."""
        return _median([each.predicted_ms.get(way.title) for each in self.repetitions])

    def measured_ms(self, way: Way) -> float | None:
        return _median([each.measured_ms.get(way.title) for each in self.repetitions])

    def speedup(self, way: Way, base: Way, *, measured: bool) -> float | None:
        """Over another way, within repetitions."""
        of = [each.measured_ms if measured else each.predicted_ms for each in self.repetitions]
        if any(way.title not in ms or base.title not in ms for ms in of):
            return None
        return statistics.median(ms[base.title] / ms[way.title] for ms in of)

    @property
    def ceiling(self) -> float:
        """What denoiser and ControlNet at the same time, with nothing lost, would bring on two devices."""
        return statistics.median(
            (each.denoiser_ms + each.controlnet_ms + each.driver_ms)
            / max(
                each.controlnet_ms / each.busy_speed,
                each.denoiser_ms + each.driver_ms + (1 / each.busy_speed - 1) * each.controlnet_ms,
            )
            for each in self.repetitions
        )

    def row(self, way: Way) -> list[str]:
        """For the table."""
        alone = WAYS[0]
        serial = next(
            each for each in WAYS
            if (each.num_stages, each.groups, each.controlnet) == (way.num_stages, way.groups, "serial")
        )  # fmt: skip
        return [
            way.title, str(way.num_devices), _shown(self.predicted_ms(way), " ms"),
            _shown(self.speedup(way, alone, measured=False), "x"),
            "" if way == serial else _shown(self.speedup(way, serial, measured=False), "x"),
            _shown(self.measured_ms(way), " ms"), _shown(self.speedup(way, alone, measured=True), "x"),
        ]  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {
            "links": [link.to_json() for link in self.links],
            "ceiling": self.ceiling,
            "ways": {
                way.title: {
                    "devices": way.num_devices,
                    "predicted_ms": self.predicted_ms(way),
                    "predicted_speedup": self.speedup(way, WAYS[0], measured=False),
                    "measured_ms": self.measured_ms(way),
                    "measured_speedup": self.speedup(way, WAYS[0], measured=True),
                }
                for way in WAYS
            },
        }


def measure_controlnet(
    *,
    arch: str,
    size: int,
    dtype: str,
    devices: Sequence[str],
    steps: int,
    runs: int,
    progress: Progress = no_progress,
) -> ControlNetBenchmark:
    """Predict and run, `runs` times. `devices`: two."""
    from asyncdiff.bench.architectures import architecture_named
    from asyncdiff.bench.link import measure_links
    from asyncdiff.bench.room import check_room
    from asyncdiff.bench.whole_model import WholeModelProcess
    from asyncdiff.bench.workload import Workload, load
    from asyncdiff.errors import ConfigurationError
    from asyncdiff.runtime.allocator import freed_memory_kept

    if architecture_named(arch).controlnet_class is None:  # before any process is started
        raise ConfigurationError(f"--arch {arch} has no ControlNet. Use controlnet-sd15 or controlnet-sdxl.")
    workload = Workload(arch, None, size, dtype)
    check_room(workload, devices)
    progress("Measuring the link", 0, 0)
    links = measure_links(devices)
    with ExitStack() as stack:
        stack.enter_context(freed_memory_kept())  # as in workers
        progress("Building the denoisers", 0, 0)
        neighbour = stack.enter_context(WholeModelProcess(workload, devices[1]))
        subject = load(replace(workload, with_controlnet=True), devices[0])
        neighbour.wait_ready()
        repetitions = []
        for number in range(runs):
            progress("Predicting and running", number, runs)
            made, output_bytes = _repeat(subject, neighbour, devices, links, steps)
            repetitions.append(made)
    return ControlNetBenchmark(
        arch, size, dtype, tuple(devices), steps, output_bytes, links, tuple(repetitions)
    )


def _repeat(
    subject: Subject,
    neighbour: WholeModelProcess,
    devices: Sequence[str],
    links: Sequence[LinkSpeed],
    steps: int,
) -> tuple[Repetition, int]:
    from asyncdiff.pipeline.devices import Placement
    from asyncdiff.simulation import Machine

    threads = Placement("spawn", tuple(devices), 2).threads_per_device
    costs = _profile(subject, threads)
    busy_speed = _busy_speed(subject, neighbour, threads)
    predicted_ms = {}
    possible = [way for way in WAYS if way.groups == 1 or costs.half is not None]
    for way in possible:
        machine = Machine(
            (1.0,) * way.num_devices,
            latency_s=max(link.latency_s for link in links),
            bandwidth_bytes_per_s=min(link.bandwidth_bytes_per_s for link in links),
            busy_speed=busy_speed if way.num_devices > 1 else 1.0,
        )
        predicted_ms[way.title] = 1e3 * _steady(costs.predict(way, machine, steps))
    measured_ms = {
        way.title: 1e3 * _steady(_run(subject, way, costs.plan(way, devices), devices, threads, steps))
        for way in possible
        if way in MEASURED
    }
    made = Repetition(
        denoiser_ms=1e3 * costs.whole.seconds,
        read_after_ms=1e3 * costs.whole.controlnet.read_after_seconds,
        controlnet_ms=1e3 * costs.whole.controlnet.seconds,
        driver_ms=1e3 * costs.driver_seconds,
        busy_speed=busy_speed,
        predicted_ms=predicted_ms,
        measured_ms=measured_ms,
    )
    return made, costs.whole.controlnet.output_bytes


@dataclass(frozen=True)
class _Profiled:
    """A denoiser call with its blocks timed, and the ControlNet's cost beside it."""

    examination: Examination
    block_seconds: Mapping[BlockKey, float]
    controlnet: ControlNetCost

    @property
    def seconds(self) -> float:
        return self.block_seconds[self.examination.recording.calls[0].key]


@dataclass(frozen=True)
class _Costs:
    """With the whole batch, and with half of it where that can be."""

    whole: _Profiled
    half: _Profiled | None
    driver_seconds: float

    def predict(self, way: Way, machine: Machine, num_steps: int) -> tuple[float, ...]:
        """Seconds of each step."""
        from asyncdiff.planner import simulate, step_seconds

        plan = self.plan(way, ["cpu"] * way.num_stages * way.groups)
        if way.controlnet == "serial":
            return simulate(plan, machine, num_steps=num_steps).step_seconds
        ahead = way.controlnet == "ahead"
        return step_seconds(plan, machine, self._of(way).controlnet, ahead=ahead, num_steps=num_steps)

    def plan(self, way: Way, devices: Sequence[str]) -> Plan:
        """How the denoiser is divided, on as many of the devices as it takes."""
        from asyncdiff.config import Settings

        of = self._of(way)
        settings = Settings(way.num_stages, warmup_steps=_WARMUP_STEPS, groups=way.groups)
        in_driver_s = of.controlnet.seconds if way.controlnet == "serial" else 0.0
        return of.examination.plan_with(
            settings,
            devices[: settings.num_workers],
            seconds=of.block_seconds,
            driver_seconds=self.driver_seconds + in_driver_s,
        )

    def _of(self, way: Way) -> _Profiled:
        of = self.whole if way.groups == 1 else self.half
        assert of is not None
        return of


def _profile(subject: Subject, threads: int | None) -> _Costs:
    from asyncdiff.pipeline.controlnet_cost import examine_controlnet, returning
    from asyncdiff.pipeline.denoiser import denoisers_of, replaced_forward
    from asyncdiff.pipeline.examination import examine, examine_part
    from asyncdiff.pipeline.profiling import profile_blocks, profile_pipeline

    pipe, device = subject.pipe, subject.device
    denoiser = next(iter(denoisers_of(pipe).values()))
    looked = examine_controlnet(pipe, subject.example, weights_at_hand=True)
    controlnet_seconds = looked.measured_seconds(device, threads)

    def profiled(examination: Examination, seconds: Mapping[BlockKey, float]) -> _Profiled:
        cost = looked.cost(controlnet_seconds, examination, seconds)
        return _Profiled(looked.before(examination), seconds, cost)

    whole = examine(denoiser, looked.denoiser_inputs, weights_at_hand=True)
    with replaced_forward(looked.module, returning(looked.output, looked.inputs)):
        profile = profile_pipeline(
            pipe, [denoiser], subject.example, looked.denoiser_inputs, whole.recording, device, threads
        )
    part = examine_part(denoiser, looked.denoiser_inputs, weights_at_hand=True)
    half = None
    if part is not None:
        half = profiled(part[0], profile_blocks(denoiser, part[1], part[0].recording, device, threads))
    return _Costs(profiled(whole, profile.block_seconds), half, profile.driver_seconds)


def _busy_speed(subject: Subject, neighbour: WholeModelProcess, threads: int | None) -> float:
    """What part of its speed a process keeps while this one works too."""
    from asyncdiff.bench.threads import intra_op_threads
    from asyncdiff.bench.whole_model import measure_together
    from asyncdiff.bench.workload import run_timed

    alone_s = statistics.median(neighbour.measure(_CEILING_STEPS, threads).step_seconds())
    with intra_op_threads(threads):  # the run here is longer than the neighbour's: it has a ControlNet
        _, busy = measure_together([neighbour], _CEILING_STEPS, threads, partial(run_timed, subject))
    return min(1.0, alone_s / statistics.median(busy.step_seconds()))


def _run(
    subject: Subject, way: Way, plan: Plan, devices: Sequence[str], threads: int | None, steps: int
) -> tuple[float, ...]:
    """Measured seconds of each step. `plan`: of the denoiser."""
    import asyncdiff
    from asyncdiff.bench.threads import intra_op_threads
    from asyncdiff.bench.workload import run_timed

    with ExitStack() as stack:
        if way.num_devices > 1:
            handle = asyncdiff.parallelize(subject.pipe, list(devices), plan=plan, controlnet=way.controlnet)
            stack.enter_context(handle)
        stack.enter_context(intra_op_threads(threads))
        run_timed(subject, _UNTIMED_STEPS)
        return tuple(run_timed(subject, steps).step_seconds())


def _steady(seconds: Sequence[float]) -> float:
    """The median step after warm-up and two more, without the last, before which nothing is done ahead."""
    return statistics.median(seconds[_FIRST_STEADY:-1])


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _shown(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value:.2f}{unit}"


def controlnet(
    arch: Annotated[
        str, typer.Option(help="Built with random weights: controlnet-sd15 or controlnet-sdxl.")
    ] = "controlnet-sdxl",
    size: Annotated[int, typer.Option(metavar="PIXELS", help="Height and width of the picture.")] = 256,
    dtype: command.TimedDtypeOption = "auto",
    devices: command.DevicesOption = "cpu,cpu",
    steps: Annotated[int, typer.Option(help="Steps of a run.")] = 12,
    runs: Annotated[int, typer.Option(help="Times everything is done.")] = 3,
    page: Annotated[
        Path | None,
        typer.Option("--page", metavar="FILE", exists=True, dir_okay=False, help="Fill the table in it."),
    ] = None,
    json_file: command.JsonOption = None,
) -> None:
    """Predict and measure what a device of its own for the ControlNet brings."""
    command.check_at_least("--steps", steps, _FIRST_STEADY + 2)
    command.check_at_least("--runs", runs, 1)
    names = _device_names(devices)
    dtype = command.timed_dtype(dtype, names)
    result = measure_controlnet(arch=arch, size=size, dtype=dtype, devices=names, steps=steps, runs=runs)
    rows = [result.row(way) for way in WAYS]
    command.show_table(f"{arch}, {size} px, {dtype}: a steady step", _HEADS, rows)
    typer.echo(f"Machine: denoiser and ControlNet at once, nothing lost, would be {result.ceiling:.2f}x.")
    command.finish("controlnet", result.to_json(), json_file)
    if page is not None:
        from asyncdiff.bench.readme import replace_measured

        page.write_text(replace_measured(page.read_text(encoding="utf-8"), markdown(result)))


def markdown(result: ControlNetBenchmark) -> str:
    """The table, and what it was measured with."""
    from asyncdiff.bench.environment import describe_environment

    environment = describe_environment()
    versions, cpu = environment["packages"], environment["devices"][0]
    lines = [f"| {' | '.join(cells)} |" for cells in (_HEADS, ["---"] * len(_HEADS), *map(result.row, WAYS))]
    return "\n".join(
        [
            *lines,
            "",
            f"{result.arch}, {result.size} px, {result.dtype}, steady steps; medians of "
            f"{len(result.repetitions)} repetitions. Denoiser and ControlNet at once, nothing lost, would be "
            f"{result.ceiling:.2f}x on this machine: {cpu['model']}, {cpu['cores']} cores, one for each "
            f"device, torch {versions['torch']}, diffusers {versions['diffusers']}. Predictions for three "
            "devices are of three such cores.",
        ]
    )


def _device_names(text: str) -> tuple[str, ...]:
    import torch

    from asyncdiff.errors import ConfigurationError
    from asyncdiff.pipeline.devices import parse_devices

    names = parse_devices(text, torch.device("cuda:0" if torch.cuda.is_available() else "cpu"))
    if len(names) != 2:
        raise ConfigurationError(
            f"--devices {text}: must be two, one for the denoiser, one for the ControlNet."
        )
    return names


if __name__ == "__main__":
    command.run_command(controlnet)
