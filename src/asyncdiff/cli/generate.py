"""`asyncdiff generate`: pictures of one prompt, on several devices."""

from __future__ import annotations

import inspect
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asyncdiff.bench.loading import load_pipeline
from asyncdiff.bench.progress import Progress
from asyncdiff.cli import arguments
from asyncdiff.cli.arguments import Dtype, Split
from asyncdiff.errors import AsyncDiffError, ConfigurationError

if TYPE_CHECKING:
    from PIL import Image

    from asyncdiff.bench.step_clock import StepClock

_AMPLIFICATION = 8.0


@dataclass(frozen=True)
class Request:
    """What is to be generated; options that were not given are None and left to the pipeline."""

    model: str | None
    dtype: Dtype
    prompt: str
    negative_prompt: str | None
    steps: int | None
    guidance_scale: float | None
    height: int | None
    width: int | None
    seed: int
    num_images: int
    output: Path
    compare: bool
    trace: Path | None
    preview_devices: int | None

    def check(self) -> None:
        """Everything that can be checked before anything is loaded."""
        arguments.check_writable("-o", self.output, arguments.IMAGE_SUFFIXES)
        arguments.check_writable("--trace", self.trace, (".json",))
        if not self.prompt.strip():
            raise ConfigurationError("--prompt is empty: say what the picture should show.")
        arguments.check_at_least("--steps", self.steps, 1)
        arguments.check_at_least("--num-images", self.num_images, 1)
        arguments.check_guidance_scale(self.guidance_scale)
        arguments.check_size("--height", self.height)
        arguments.check_size("--width", self.width)
        arguments.check_seed(self.seed)
        arguments.check_at_least("--preview-devices", self.preview_devices, 2)
        if self.model is not None:
            arguments.check_model(self.model)

    def call_arguments(self, pipe: Any) -> dict[str, Any]:
        """The keyword arguments of the call; `ConfigurationError` if this pipeline has no such option."""
        given = {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "height": self.height,
            "width": self.width,
        }
        known = inspect.signature(pipe.__call__).parameters
        for name, value in given.items():
            if value is not None and name not in known:
                option = "--steps" if name == "num_inference_steps" else "--" + name.replace("_", "-")
                raise ConfigurationError(f"{option} is not an option of {type(pipe).__name__}. Leave it out.")
        if self.model is None and self.guidance_scale is None:
            from asyncdiff.demo import GUIDANCE_SCALE

            given["guidance_scale"] = GUIDANCE_SCALE
        return {name: value for name, value in given.items() if value is not None}

    def image_paths(self) -> list[Path]:
        """`out.png`, or `out-1.png`, `out-2.png` ... when several images are asked for."""
        if self.num_images == 1:
            return [self.output]
        return [self.output.with_stem(f"{self.output.stem}-{i + 1}") for i in range(self.num_images)]


def generate(
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What the picture should show.")],
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="Where the picture goes (.png, .jpg, .webp; an existing file is replaced). "
            "Several pictures become FILE-1, FILE-2 ...",
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", metavar="ID|FOLDER", help="Hub id or folder. By default the bundled demo model."
        ),
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option("--dtype", help="'auto' is float16 on accelerators and float32 on CPUs.")
    ] = "auto",
    negative_prompt: Annotated[
        str | None, typer.Option("--negative-prompt", help="What it should not show.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Denoising steps.")] = None,
    guidance_scale: Annotated[float | None, typer.Option("--guidance-scale")] = None,
    height: Annotated[int | None, typer.Option("--height", metavar="PIXELS")] = None,
    width: Annotated[int | None, typer.Option("--width", metavar="PIXELS")] = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", help="Of the first picture; the next ones count up. By default random."),
    ] = None,
    num_images: Annotated[int, typer.Option("--num-images", "-n", help="Pictures, one after the other.")] = 1,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Also generate in order on one device, and write FILE-compare: "
            f"original, asyncdiff, difference x {_AMPLIFICATION:g}.",
        ),
    ] = False,
    trace: Annotated[
        Path | None,
        typer.Option(
            "--trace", metavar="FILE", help="Write the last run's time line (.json, for ui.perfetto.dev)."
        ),
    ] = None,
    devices: arguments.DevicesOption = None,
    preview_devices: Annotated[
        int | None,
        typer.Option(
            "--preview-devices",
            metavar="N",
            help="Instead of --devices: make the pictures that N devices would give on one, at its speed.",
        ),
    ] = None,
    stages: arguments.StagesOption = None,
    stride: arguments.StrideOption = 1,
    warmup_steps: arguments.WarmupOption = "1",
    tolerance: arguments.ToleranceOption = None,
    time_shift: arguments.TimeShiftOption = False,
    forecast: arguments.ForecastOption = "latents",
    freshness: arguments.FreshnessOption = "auto",
    guidance: arguments.GuidanceOption = "auto",
    guidance_refresh: arguments.GuidanceRefreshOption = 1,
    debug: arguments.DebugOption = False,
) -> None:
    """Generate pictures of a prompt on several devices."""
    request = Request(
        model=model,
        dtype=dtype,
        prompt=prompt,
        negative_prompt=negative_prompt,
        steps=steps,
        guidance_scale=guidance_scale,
        height=height,
        width=width,
        seed=random.randrange(2**32) if seed is None else seed,
        num_images=num_images,
        output=output,
        compare=compare,
        trace=trace,
        preview_devices=preview_devices,
    )
    request.check()
    if preview_devices is not None:
        if devices is not None:
            raise ConfigurationError(
                f"--devices {devices} and --preview-devices {preview_devices}: a preview is made on one "
                "device. Give one of them."
            )
        devices = str(preview_devices)  # divided as for so many
    split = arguments.check_split(
        devices,
        stages,
        stride,
        warmup_steps,
        tolerance,
        time_shift,
        forecast,
        freshness,
        guidance,
        guidance_refresh,
    )
    run(request, split)


def run(request: Request, split: Split) -> None:
    """Load, generate, compare where asked, write the files and print the figures."""
    from asyncdiff.cli.console import print_table, progress, quiet_libraries
    from asyncdiff.cli.devices import resolve_devices

    devices = resolve_devices(split.devices if request.preview_devices is None else 1)
    count = request.preview_devices or len(devices)
    arguments.stages_for(count, split.num_stages, split.stride, split.guidance)
    quiet_libraries()
    name = request.model or "the demo model"
    with progress(f"Loading {name}") as report:
        report(f"Loading {name}", 0, 0)
        pipe = load_pipeline(request.model, request.dtype, devices[0])
        call = request.call_arguments(pipe)
        parallel = _run_parallel(pipe, call, request, split, devices, report)
        original = (
            _run_in_order(pipe, call, request, parallel, devices[0], report) if request.compare else None
        )
    written = _write_images(request, parallel.images)
    if original is not None:
        written.append(_write_comparison(request, original.images, parallel.images))
    if request.trace is not None:
        written.append(request.trace)
    print_table(f"{name}, seed {request.seed}", _rows(request, parallel, original, devices, written))


@dataclass(frozen=True)
class Outcome:
    """The images of one way of running, and their clocks. `threads`: intra-op threads per device (CPU).
    `split`: how the denoiser was divided, for people."""

    images: list[Image.Image]
    clocks: list[StepClock]
    threads: int | None
    bytes_sent: int = 0
    split: str = ""

    @property
    def seconds_per_step(self) -> float:
        return min(clock.seconds_per_step for clock in self.clocks)

    @property
    def seconds(self) -> float:
        """Of the fastest image: the first one also pays for what is set up once."""
        return min(clock.seconds for clock in self.clocks)


def _run_parallel(
    pipe: Any,
    call: dict[str, Any],
    request: Request,
    split: Split,
    devices: list[str],
    report: Progress,
) -> Outcome:
    import asyncdiff

    names = ", ".join(devices)
    over, where = f"over {names}", f"On {names}"
    if request.preview_devices is not None:
        over, where = f"as for {request.preview_devices} devices", f"One stage after the other on {names}"
    report(f"Dividing the denoiser {over}", 0, 0)
    with asyncdiff.parallelize(
        pipe,
        request.preview_devices or devices,
        num_stages=split.num_stages,
        stride=split.stride,
        warmup_steps=split.warmup_steps,
        tolerance=split.tolerance,
        time_shift=split.time_shift,
        forecast=split.forecast,
        freshness=split.freshness,
        guidance=split.guidance,
        guidance_refresh=split.guidance_refresh,
        runtime="auto" if request.preview_devices is None else "local",
    ) as handle:
        skip = (1 if isinstance(split.warmup_steps, str) else split.warmup_steps) + 1
        images, clocks = _generate_all(pipe, call, request, where, skip, report)
        if request.trace is not None:
            handle.last_run.write_trace(request.trace)
        plan = handle.plan
        assert plan is not None  # it has run
        stages = f"stages: {plan.num_stages}"
        return Outcome(
            images,
            clocks,
            plan.threads_per_device,
            handle.last_run.bytes_sent,
            f"groups for guidance: {plan.groups}, {stages} each" if plan.groups > 1 else stages,
        )


def _run_in_order(
    pipe: Any, call: dict[str, Any], request: Request, parallel: Outcome, device: str, report: Progress
) -> Outcome:
    """The untouched pipeline on one device, with as many threads as each device had."""
    from asyncdiff.bench.threads import intra_op_threads

    with intra_op_threads(parallel.threads):
        images, clocks = _generate_all(pipe, call, request, f"In order on {device}", 1, report)
    return Outcome(images, clocks, parallel.threads)


def _generate_all(
    pipe: Any, call: dict[str, Any], request: Request, where: str, skip: int, report: Progress
) -> tuple[list[Image.Image], list[StepClock]]:
    import torch

    from asyncdiff.bench.step_clock import StepClock

    images, clocks = [], []
    takes_callback = "callback_on_step_end" in inspect.signature(pipe.__call__).parameters
    for i in range(request.num_images):
        title = where if request.num_images == 1 else f"{where}, picture {i + 1} of {request.num_images}"
        report(title, 0, 0)
        clock = StepClock(title, skip=skip, progress=report)
        watched = {"callback_on_step_end": clock} if takes_callback else {}
        # Random numbers from the CPU are the same on every kind of device.
        generator = torch.Generator("cpu").manual_seed(request.seed + i)
        output = pipe(**call, **watched, generator=generator)
        clock.finish()
        if not hasattr(output, "images"):
            raise AsyncDiffError(
                f"{type(pipe).__name__} makes no pictures; `asyncdiff generate` is for those that do."
            )
        images.append(output.images[0])
        clocks.append(clock)
    return images, clocks


def _write_images(request: Request, images: list[Image.Image]) -> list[Path]:
    paths = request.image_paths()
    for path, image in zip(paths, images, strict=True):
        image.save(path)
    return paths


def _write_comparison(request: Request, originals: list[Image.Image], parallels: list[Image.Image]) -> Path:
    from asyncdiff.bench.pictures import side_by_side

    path = request.output.with_stem(request.output.stem + "-compare")
    captions = [f"{request.prompt} (seed {request.seed + i})" for i in range(len(originals))]
    side_by_side(list(zip(originals, parallels, strict=True)), captions, amplification=_AMPLIFICATION).save(
        path
    )
    return path


def _rows(
    request: Request,
    parallel: Outcome,
    original: Outcome | None,
    devices: list[str],
    written: list[Path],
) -> list[tuple[str, str, str]]:
    if request.preview_devices is not None:
        rows = _preview_rows(request.preview_devices, devices[0], parallel)
        rows += [] if original is None else [_psnr_row(parallel, original)]
    else:
        rows = _parallel_rows(parallel, devices)
        rows += [] if original is None else _comparison_rows(parallel, original)
    return rows + [("written", "", str(path)) for path in written]


def _preview_rows(count: int, device: str, parallel: Outcome) -> list[tuple[str, str, str]]:
    """No times: they are those of one device that does the work of all."""
    return [
        ("preview of", f"{count} devices", f"the pictures they would give; {parallel.split}"),
        ("made on", device, "one stage after the other: not faster than in order"),
    ]


def _parallel_rows(parallel: Outcome, devices: list[str]) -> list[tuple[str, str, str]]:
    threads = f", threads each: {parallel.threads}" if parallel.threads else ""
    return [
        ("devices", ", ".join(devices), f"{parallel.split}{threads}"),
        ("milliseconds per step", _number(parallel.seconds_per_step * 1e3, 1), "median, after warm-up"),
        ("seconds per picture", _number(parallel.seconds, 2), "whole call"),
        ("megabytes sent per picture", _number(parallel.bytes_sent / 1e6, 2), "between devices"),
    ]


def _comparison_rows(parallel: Outcome, original: Outcome) -> list[tuple[str, str, str]]:
    step_speedup = original.seconds_per_step / parallel.seconds_per_step
    return [
        (
            "in order, milliseconds per step",
            _number(original.seconds_per_step * 1e3, 1),
            "one device, same threads",
        ),
        ("in order, seconds per picture", _number(original.seconds, 2), "whole call"),
        ("speed-up of a step", _number(step_speedup, 2), "after warm-up"),
        (
            "speed-up of the call",
            _number(original.seconds / parallel.seconds, 2),
            "with text encoder and VAE",
        ),
        _psnr_row(parallel, original),
    ]


def _psnr_row(parallel: Outcome, original: Outcome) -> tuple[str, str, str]:
    from asyncdiff.bench.pictures import psnr_db

    psnr = min(psnr_db(a, b) for a, b in zip(original.images, parallel.images, strict=True))
    return (
        "PSNR",
        "identical" if math.isinf(psnr) else f"{psnr:.1f} dB",
        "against in order" if len(original.images) == 1 else "against in order, lowest of the pictures",
    )


def _number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"
