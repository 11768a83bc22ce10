"""How far the predicted time of a whole run is from the measured one.

Per repetition the blocks are timed, the machine's ceiling is measured, the run is predicted from both, and
then it is made. Where devices slow each other down (cores of one processor), the predicted speed of every
block after warm-up is that of processes which all run the whole denoiser at the same time.

python -m asyncdiff.bench.prediction_check --arch sd21 --size 256 --dtype bfloat16 --devices 2 --steps 30

With `--guidance-refresh K` one half of guidance is left out between refreshes.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asyncdiff.bench import command
from asyncdiff.bench.progress import Progress, no_progress

if TYPE_CHECKING:
    from asyncdiff.bench.link import LinkSpeed
    from asyncdiff.bench.whole_model import WholeModelProcess
    from asyncdiff.bench.workload import Subject
    from asyncdiff.planner import Plan

_WARMUP_STEPS = 1
_UNTIMED_STEPS = 6
_CEILING_STEPS = 6


@dataclass(frozen=True)
class Repetition:
    """`busy_speed`: what part of its speed a process keeps while as many as there are devices work.
    `driver_ms`: the noise scheduler's and guidance's, per step. Seconds are those of whole runs; those in
    order are of as many steps with the whole batch, `in_order_s` by the sum of all blocks and
    `measured_in_order_s` from single steps.
    """

    kind: str
    busy_speed: float
    driver_ms: float
    stage_ms: tuple[float, ...]
    predicted_s: float
    measured_s: float
    in_order_s: float
    measured_in_order_s: float

    @property
    def error(self) -> float:
        """Of the prediction, relative to what was measured; positive where it was too slow."""
        return self.predicted_s / self.measured_s - 1.0

    @property
    def in_order_error(self) -> float:
        return self.in_order_s / self.measured_in_order_s - 1.0

    @property
    def speedup(self) -> float:
        return self.measured_in_order_s / self.measured_s

    def row(self, number: int, num_devices: int) -> list[str]:
        """For the table."""
        return [
            str(number), self.kind, f"{num_devices * self.busy_speed:.2f}", f"{self.driver_ms:.2f} ms",
            f"{self.predicted_s:.3f} s", f"{self.measured_s:.3f} s", f"{self.error:+.1%}",
            f"{self.in_order_s:.3f} s", f"{self.measured_in_order_s:.3f} s", f"{self.in_order_error:+.1%}",
            f"{self.speedup:.2f}x",
        ]  # fmt: skip


@dataclass(frozen=True)
class PredictionCheck:
    """`links`: measured beforehand, once; the slowest counts."""

    arch: str
    size: int
    dtype: str
    devices: tuple[str, ...]
    steps: int
    guidance_refresh: int
    links: tuple[LinkSpeed, ...]
    repetitions: tuple[Repetition, ...]

    @property
    def error(self) -> float:
        """Median over the repetitions."""
        return statistics.median(each.error for each in self.repetitions)

    @property
    def speedup(self) -> float:
        """Of the whole run over one in order; median over the repetitions."""
        return statistics.median(each.speedup for each in self.repetitions)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {
            "links": [link.to_json() for link in self.links],
            "repetitions": [
                asdict(each)
                | {"error": each.error, "in_order_error": each.in_order_error, "speedup": each.speedup}
                for each in self.repetitions
            ],
            "error": self.error,
            "speedup": self.speedup,
        }


def check_prediction(
    *,
    arch: str,
    size: int,
    dtype: str,
    devices: Sequence[str],
    steps: int,
    runs: int,
    guidance_refresh: int = 1,
    progress: Progress = no_progress,
) -> PredictionCheck:
    """Predict and make a run of `steps` steps on as many stages as devices, `runs` times."""
    from asyncdiff.bench.architectures import architecture_named
    from asyncdiff.bench.link import measure_links
    from asyncdiff.bench.room import check_room
    from asyncdiff.bench.whole_model import WholeModelProcess
    from asyncdiff.bench.workload import Workload, load
    from asyncdiff.runtime.allocator import freed_memory_kept

    architecture_named(arch)  # before any process is started
    workload = Workload(arch, None, size, dtype)
    check_room(workload, [devices[0], *devices])
    progress("Measuring the link", 0, 0)
    links = measure_links(devices)
    with ExitStack() as stack:
        stack.enter_context(freed_memory_kept())  # as in workers
        progress("Building the denoisers", 0, 0)
        wholes = [stack.enter_context(WholeModelProcess(workload, device)) for device in devices]
        subject = load(workload, devices[0])
        for whole in wholes:
            whole.wait_ready()
        repetitions = []
        for number in range(runs):
            progress("Predicting and running", number, runs)
            repetitions.append(_repeat(subject, wholes, devices, links, steps, guidance_refresh))
    return PredictionCheck(
        arch, size, dtype, tuple(devices), steps, guidance_refresh, links, tuple(repetitions)
    )


def _repeat(
    subject: Subject,
    wholes: Sequence[WholeModelProcess],
    devices: Sequence[str],
    links: Sequence[LinkSpeed],
    steps: int,
    guidance_refresh: int,
) -> Repetition:
    import asyncdiff
    from asyncdiff.bench.workload import run_timed
    from asyncdiff.simulation import Machine

    def planned(guidance_refresh: int) -> Plan:
        return asyncdiff.plan(
            subject.pipe,
            list(devices),
            warmup_steps=_WARMUP_STEPS,
            guidance="together",
            guidance_refresh=guidance_refresh,
            profile=True,
            example=subject.example,
        )

    chosen = planned(guidance_refresh)
    # The blocks of a refreshed plan are those of one half of guidance, which costs more than half of both.
    whole = chosen if guidance_refresh == 1 else planned(1)
    predictions, of_whole = chosen.predictions, whole.predictions
    assert predictions is not None
    assert of_whole is not None
    alone_s, together_s = _step_seconds(wholes, chosen.threads_per_device)
    machine = Machine(
        predictions.speeds or (1.0,) * len(devices),
        latency_s=max(link.latency_s for link in links),
        bandwidth_bytes_per_s=min(link.bandwidth_bytes_per_s for link in links),
        busy_speed=min(1.0, alone_s / together_s),
    )
    predicted = asyncdiff.simulate(chosen, machine, num_steps=steps)
    with asyncdiff.parallelize(subject.pipe, list(devices), plan=chosen):
        run_timed(subject, max(_UNTIMED_STEPS, _WARMUP_STEPS + 2 * guidance_refresh))
        measured = run_timed(subject, steps)
    return Repetition(
        kind=chosen.kind,
        busy_speed=machine.busy_speed,
        driver_ms=1e3 * predictions.driver_seconds,
        stage_ms=tuple(1e3 * seconds for seconds in predictions.stage_seconds),
        predicted_s=predicted.total_s,
        measured_s=measured.seconds,
        in_order_s=steps * of_whole.step_in_order_seconds(whole.stride),
        measured_in_order_s=steps * alone_s,
    )


def _step_seconds(wholes: Sequence[WholeModelProcess], threads: int | None) -> tuple[float, float]:
    """The median step of the first device's process while the others rest, and while all work."""
    from asyncdiff.bench.whole_model import measure_together

    alone = wholes[0].measure(_CEILING_STEPS, threads)
    together = measure_together(wholes, _CEILING_STEPS, threads)
    steps = [second for run in together for second in run.step_seconds()]
    return statistics.median(alone.step_seconds()), statistics.median(steps)


def prediction_check(
    arch: Annotated[
        str, typer.Option(help="Denoiser, built with random weights: sd15, sd21, sdxl ...")
    ] = "sd21",
    size: Annotated[int, typer.Option(metavar="PIXELS", help="Height and width of the picture.")] = 256,
    dtype: command.TimedDtypeOption = "auto",
    devices: Annotated[
        str, typer.Option(metavar="N|LIST", help="A number, or names separated by commas.")
    ] = "2",
    steps: Annotated[int, typer.Option(help="Steps of the run.")] = 30,
    guidance_refresh: Annotated[
        int, typer.Option(metavar="K", help="Both halves of guidance at every K-th step only.")
    ] = 1,
    runs: Annotated[int, typer.Option(help="Times everything is done.")] = 3,
    json_file: command.JsonOption = None,
) -> None:
    """Predict the time of a whole run, make it, and say by how much the prediction was wrong."""
    command.check_at_least("--steps", steps, _WARMUP_STEPS + 1)
    command.check_at_least("--runs", runs, 1)
    command.check_at_least("--guidance-refresh", guidance_refresh, 1)
    names = _device_names(devices)
    dtype = command.timed_dtype(dtype, names)
    command.check_at_least("--devices", len(names), 2)
    result = check_prediction(
        arch=arch,
        size=size,
        dtype=dtype,
        devices=names,
        steps=steps,
        runs=runs,
        guidance_refresh=guidance_refresh,
    )
    command.show_table(
        f"{arch}, {size} px, {dtype}, {steps} steps on {len(names)} devices",
        [
            "repetition", "split", "ceiling", "driver", "predicted", "measured", "error",
            "in order, predicted", "measured", "error", "speed-up",
        ],
        [each.row(number + 1, len(names)) for number, each in enumerate(result.repetitions)],
    )  # fmt: skip
    typer.echo(
        f"Error of the prediction: {result.error:+.1%}; speed-up of the run: {result.speedup:.2f}x "
        f"(medians of {runs})"
    )
    command.finish("prediction_check", result.to_json(), json_file)


def _device_names(text: str) -> tuple[str, ...]:
    import torch

    from asyncdiff.pipeline.devices import parse_devices

    kind = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    return parse_devices(int(text) if text.isdecimal() else text, kind)


if __name__ == "__main__":
    command.run_command(prediction_check)
