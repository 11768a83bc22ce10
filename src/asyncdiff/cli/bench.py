"""`asyncdiff bench`: measurements. `step`: milliseconds of one denoising step."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer

from asyncdiff.cli import arguments


def build_app() -> typer.Typer:
    """The commands below `asyncdiff bench`."""
    app = typer.Typer()
    app.callback(invoke_without_command=True)(_group)
    app.command("step")(step)
    return app


def _group(context: typer.Context) -> None:
    """Measure on this machine."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def step(
    arch: Annotated[
        str, typer.Option("--arch", help="Denoiser, built with random weights: sd15, sd21, sdxl, sd3 ...")
    ] = "sd21",
    size: Annotated[
        int, typer.Option("--size", metavar="PIXELS", help="Height and width of the picture.")
    ] = 256,
    dtype: Annotated[Literal["float32", "float16", "bfloat16"], typer.Option("--dtype")] = "bfloat16",
    steps: Annotated[int, typer.Option("--steps", help="Timed steps of a run.")] = 8,
    runs: Annotated[int, typer.Option("--runs", help="Times everything is measured.")] = 3,
    json_file: arguments.JsonOption = None,
    devices: arguments.DevicesOption = None,
    stages: arguments.StagesOption = None,
    stride: arguments.StrideOption = 1,
    time_shift: arguments.TimeShiftOption = False,
    forecast: arguments.ForecastOption = "linear",
    debug: arguments.DebugOption = False,
) -> None:
    """Time one denoising step in order and asynchronously, beside what this machine can reach at all."""
    arguments.check_size("--size", size)
    arguments.check_at_least("--steps", steps, 1)
    arguments.check_at_least("--runs", runs, 1)
    arguments.check_writable("--json", json_file, (".json",))
    split = arguments.check_split(devices, stages, stride, 1, time_shift, forecast)

    from asyncdiff.cli.console import print_table, progress, quiet_libraries
    from asyncdiff.cli.devices import resolve_devices

    names = resolve_devices(split.devices)
    num_stages = arguments.stages_for(len(names), split.num_stages, split.stride)
    quiet_libraries()
    with progress("Starting") as report:
        from asyncdiff.bench.step import run_step

        result = run_step(
            arch=arch,
            size=size,
            dtype=dtype,
            devices=names,
            num_stages=num_stages,
            stride=split.stride,
            forecast=split.forecast,
            time_shift=split.time_shift,
            runs=runs,
            steps=steps,
            progress=report,
        )
    if json_file is not None:
        json_file.write_text(json.dumps(result.to_json(), indent=2) + "\n")
    print_table(f"{arch}, {size} px, {dtype}", result.rows())
