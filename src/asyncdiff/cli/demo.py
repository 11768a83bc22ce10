"""`asyncdiff demo`: a bundled pipeline on one device and on several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from asyncdiff.cli import arguments


def demo(
    model: Annotated[
        Literal["unet", "transformer"],
        typer.Option("--model", "-m", help="The bundled pipeline whose denoiser is of this kind."),
    ] = "unet",
    picture: Annotated[
        Path,
        typer.Option(
            "--picture", metavar="FILE", help="Where the picture goes: original, asyncdiff, difference."
        ),
    ] = Path("asyncdiff-demo.png"),
    trace: Annotated[
        Path, typer.Option("--trace", metavar="FILE", help="Where the time line goes (for ui.perfetto.dev).")
    ] = Path("asyncdiff-demo-trace.json"),
    json_file: arguments.JsonOption = None,
    steps: Annotated[int, typer.Option("--steps", help="Denoising steps.")] = 50,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    devices: arguments.DevicesOption = None,
    stages: arguments.StagesOption = None,
    stride: arguments.StrideOption = 1,
    warmup_steps: arguments.WarmupOption = "1",
    tolerance: arguments.ToleranceOption = None,
    time_shift: arguments.TimeShiftOption = False,
    forecast: arguments.ForecastOption = "latents",
    freshness: arguments.FreshnessOption = "auto",
    debug: arguments.DebugOption = False,
) -> None:
    """Run a bundled pipeline in order and asynchronously: a picture, a trace, times, speed-up and PSNR."""
    arguments.check_writable("--picture", picture, arguments.IMAGE_SUFFIXES)
    arguments.check_writable("--trace", trace, (".json",))
    arguments.check_writable("--json", json_file, (".json",))
    arguments.check_at_least("--steps", steps, 2)
    arguments.check_seed(seed)
    split = arguments.check_split(
        devices, stages, stride, warmup_steps, tolerance, time_shift, forecast, freshness
    )

    from asyncdiff.cli.console import print_table, progress, quiet_libraries
    from asyncdiff.cli.devices import resolve_devices

    names = resolve_devices(split.devices)
    num_stages = arguments.stages_for(len(names), split.num_stages, split.stride)
    quiet_libraries()
    with progress("Starting") as report:
        report("Loading the demo model", 0, 0)
        from asyncdiff.bench.demo import run_demo

        result = run_demo(
            names,
            model=model,
            num_stages=num_stages,
            stride=split.stride,
            warmup_steps=split.warmup_steps,
            tolerance=split.tolerance,
            time_shift=split.time_shift,
            forecast=split.forecast,
            freshness=split.freshness,
            steps=steps,
            seed=seed,
            progress=report,
        )
    result.picture.save(picture)
    result.write_trace(trace)
    if json_file is not None:
        json_file.write_text(json.dumps(result.to_json(), indent=2) + "\n")
    print_table("asyncdiff demo", [*result.rows(), ("picture", "", str(picture)), ("trace", "", str(trace))])
