"""`asyncdiff bench`: whole runs in order and in several configurations. `step`: one denoising step."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from asyncdiff.bench.configurations import Configuration, parse_configurations
from asyncdiff.cli import arguments
from asyncdiff.errors import ConfigurationError

if TYPE_CHECKING:
    from asyncdiff.bench.workload import Workload

_DEFAULT_ARCH = "sd21"
_DEFAULT_SIZE = 256
_DEFAULT_DEVICES = 2

_ChannelsLastOption: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--channels-last",
        help="Keep the denoiser's weights as pipe.unet.to(memory_format=torch.channels_last) does.",
    ),
]


def build_app() -> typer.Typer:
    """`asyncdiff bench` and the commands below it."""
    app = typer.Typer()
    app.callback(invoke_without_command=True)(bench)
    app.command("step")(step)
    return app


def bench(
    context: typer.Context,
    arch: Annotated[
        str | None,
        typer.Option(
            "--arch",
            metavar="NAME",
            help="Denoiser, built with random weights and no download: sd15, sd21, sdxl, svd, animatediff, "
            f"sd3, flux, wan-2.1 ... By default {_DEFAULT_ARCH}.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="ID|FOLDER",
            help="Instead: a real pipeline with all its parts; 'demo' is the bundled one.",
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="With --model: what to generate.")] = None,
    size: Annotated[
        int | None,
        typer.Option(
            "--size",
            metavar="PIXELS",
            help=f"Height and width. By default {_DEFAULT_SIZE}, with --model the pipeline's own.",
        ),
    ] = None,
    dtype: Annotated[
        arguments.Dtype,
        typer.Option(
            "--dtype",
            help="'auto' is bfloat16, or float32 on CPUs that cannot compute it; with --model float16 on "
            "accelerators and float32 on CPUs.",
        ),
    ] = "auto",
    channels_last: _ChannelsLastOption = False,
    devices: arguments.DevicesOption = None,
    configs: Annotated[
        str,
        typer.Option(
            "--configs",
            metavar="auto|LIST",
            help="STAGESxSTRIDE, separated by commas: 2x1,3x1,2x2. One takes stages + stride - 1 of the "
            "devices; 'auto' is all that fit and take more than one.",
        ),
    ] = "auto",
    warmup_steps: arguments.WarmupStepsOption = 1,
    steps: Annotated[int, typer.Option("--steps", help="Steps of a run.")] = 20,
    runs: Annotated[int, typer.Option("--runs", help="Timed runs of each kind, taking turns.")] = 3,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="Also measure diffusers' context parallelism and caches. With --arch only."
        ),
    ] = False,
    json_file: arguments.JsonOption = None,
    csv_file: Annotated[
        Path | None,
        typer.Option("--csv", metavar="FILE", help="Also write a row per configuration and kind of run."),
    ] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Also write a page with plots and tables.")
    ] = None,
    debug: arguments.DebugOption = False,
) -> None:
    """Measure in order against asynchronous configurations, beside what this machine can reach at all."""
    if context.invoked_subcommand is not None:
        _refuse_options_before_a_command(context)
        return
    request = _check(
        arch, model, prompt, size, dtype, channels_last, devices, configs, warmup_steps, steps, runs, compare,
        Outputs(json_file, csv_file, html_file),
    )  # fmt: skip
    _run(request)


def _refuse_options_before_a_command(context: typer.Context) -> None:
    """They are those of `asyncdiff bench` itself: a command below it would not see them."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is not None and source.name == "COMMANDLINE" and parameter.name != "debug":
            command = context.invoked_subcommand
            raise ConfigurationError(
                f"{parameter.opts[0]} before {command} is not an option of it: write "
                f"`asyncdiff bench {command} {parameter.opts[0]} ...`."
            )


@dataclass(frozen=True)
class Outputs:
    """Files to write, where asked for."""

    json_file: Path | None
    csv_file: Path | None
    html_file: Path | None

    def check(self) -> None:
        """Before anything is measured."""
        arguments.check_writable("--json", self.json_file, (".json",))
        arguments.check_writable("--csv", self.csv_file, (".csv",))
        arguments.check_writable("--html", self.html_file, (".html", ".htm"))
        if self.html_file is not None and importlib.util.find_spec("matplotlib") is None:
            raise ConfigurationError("--html needs matplotlib: pip install 'asyncdiff[bench]'.")

    def write(self, result: Any) -> list[Path]:
        """The files written."""
        from asyncdiff.bench.runs.tables import write_csv

        if self.json_file is not None:
            self.json_file.write_text(json.dumps(result.to_json(), indent=2) + "\n", encoding="utf-8")
        if self.csv_file is not None:
            write_csv(result, self.csv_file)
        if self.html_file is not None:
            from asyncdiff.bench.runs.page import page

            self.html_file.write_text(page(result), encoding="utf-8")
        return [path for path in (self.json_file, self.csv_file, self.html_file) if path is not None]


@dataclass(frozen=True)
class Request:
    """What is to be measured, checked as far as possible without knowing the machine."""

    arch: str | None
    model: str | None
    prompt: str
    size: int | None
    dtype: str
    channels_last: bool
    devices: int | tuple[str, ...] | None
    configurations: tuple[Configuration, ...]
    skip_refused: bool
    warmup_steps: int
    steps: int
    runs: int
    compare: bool
    outputs: Outputs


def _check(
    arch: str | None,
    model: str | None,
    prompt: str | None,
    size: int | None,
    dtype: str,
    channels_last: bool,
    devices: str | None,
    configs: str,
    warmup_steps: int,
    steps: int,
    runs: int,
    compare: bool,
    outputs: Outputs,
) -> Request:
    if model is not None:
        _check_model_options(arch, model, compare)
    elif prompt is not None:
        raise ConfigurationError("--prompt is for --model: an --arch with random weights draws nothing.")
    arguments.check_size("--size", size)
    arguments.check_at_least("--warmup-steps", warmup_steps, 1)
    arguments.check_at_least("--runs", runs, 1)
    outputs.check()
    asked = None if devices is None else arguments.parse_devices(devices)
    count = asked if isinstance(asked, int) else len(asked) if asked else _DEFAULT_DEVICES
    configurations = parse_configurations(configs, count)
    longest = max(configurations, key=lambda each: each.shortest_run(warmup_steps))
    if steps < longest.shortest_run(warmup_steps):
        raise ConfigurationError(
            f"--steps {steps}: too few to reach the steady state of {longest} after --warmup-steps "
            f"{warmup_steps}. Use {longest.shortest_run(warmup_steps)} or more."
        )
    from asyncdiff.demo import DEMO_CAPTIONS

    return Request(
        arch=None if model is not None else arch or _DEFAULT_ARCH,
        model=model,
        prompt="" if model is None else prompt or DEMO_CAPTIONS[0],
        size=size if model is not None else size or _DEFAULT_SIZE,
        dtype=dtype,
        channels_last=channels_last,
        devices=asked,
        configurations=configurations,
        skip_refused=configs.strip() == "auto",
        warmup_steps=warmup_steps,
        steps=steps,
        runs=runs,
        compare=compare,
        outputs=outputs,
    )


def _check_model_options(arch: str | None, model: str, compare: bool) -> None:
    if arch is not None:
        raise ConfigurationError(f"--arch {arch} and --model {model}: give one of them.")
    if compare:
        raise ConfigurationError("--compare is for --arch: the other ways are measured in its loop.")
    if model != "demo":
        arguments.check_model(model)


def _run(request: Request) -> None:
    """Measure, write the files and print the tables."""
    from asyncdiff.cli.console import print_report, progress, quiet_libraries
    from asyncdiff.cli.devices import resolve_devices

    devices = resolve_devices(request.devices)
    quiet_libraries()
    from asyncdiff.bench.workload import Workload, dtype_of_random_weights

    dtype = dtype_of_random_weights(request.dtype, devices) if request.model is None else request.dtype
    workload = Workload(
        request.arch,
        request.model,
        request.size,
        dtype,
        request.prompt,
        channels_last=request.channels_last,
    )
    _announce(request, workload, devices)
    with progress("Starting") as report:
        from asyncdiff.bench.runs.measure import run_bench
        from asyncdiff.bench.runs.tables import machine_rows, tables

        result = run_bench(
            workload,
            devices,
            request.configurations,
            warmup_steps=request.warmup_steps,
            steps=request.steps,
            runs=request.runs,
            skip_refused=request.skip_refused,
            compare=request.compare,
            progress=report,
        )
    print_report(tables(result), machine_rows(result), request.outputs.write(result))


def _announce(request: Request, workload: Workload, devices: list[str]) -> None:
    names = ", ".join(map(str, request.configurations))
    typer.echo(
        f"Measuring {workload.title}, on {', '.join(devices)}: in "
        f"order, {names} (stages x stride), and what this machine can do at all; {request.runs} runs of "
        f"{request.steps} steps each, taking turns, after untimed ones. Best when nothing else runs.",
        err=True,
    )


def step(
    arch: Annotated[
        str, typer.Option("--arch", help="Denoiser, built with random weights: sd15, sd21, sdxl, sd3 ...")
    ] = "sd21",
    size: Annotated[
        int, typer.Option("--size", metavar="PIXELS", help="Height and width of the picture.")
    ] = 256,
    dtype: Annotated[
        arguments.Dtype,
        typer.Option("--dtype", help="'auto' is bfloat16, or float32 on CPUs that cannot compute it."),
    ] = "auto",
    channels_last: _ChannelsLastOption = False,
    steps: Annotated[int, typer.Option("--steps", help="Timed steps of a run.")] = 8,
    runs: Annotated[int, typer.Option("--runs", help="Times everything is measured.")] = 3,
    json_file: arguments.JsonOption = None,
    devices: arguments.DevicesOption = None,
    stages: arguments.StagesOption = None,
    stride: arguments.StrideOption = 1,
    time_shift: arguments.TimeShiftOption = False,
    forecast: arguments.ForecastOption = "latents",
    freshness: arguments.FreshnessOption = "auto",
    guidance: arguments.GuidanceOption = "together",
    guidance_refresh: arguments.GuidanceRefreshOption = 1,
    debug: arguments.DebugOption = False,
) -> None:
    """Time one denoising step in order and asynchronously, beside what this machine can reach at all."""
    arguments.check_size("--size", size)
    arguments.check_at_least("--steps", steps, 1)
    arguments.check_at_least("--runs", runs, 1)
    arguments.check_writable("--json", json_file, (".json",))
    split = arguments.check_split(
        devices,
        stages,
        stride,
        "1",
        None,
        time_shift,
        forecast,
        freshness,
        guidance,
        guidance_refresh,
    )

    from asyncdiff.cli.console import print_table, progress, quiet_libraries
    from asyncdiff.cli.devices import resolve_devices

    names = resolve_devices(split.devices)
    num_stages = arguments.stages_for(len(names), split.num_stages, split.stride, split.guidance)
    quiet_libraries()
    with progress("Starting") as report:
        from asyncdiff.bench.step import run_step
        from asyncdiff.bench.workload import Workload, dtype_of_random_weights

        chosen = dtype_of_random_weights(dtype, names)
        result = run_step(
            arch=arch,
            size=size,
            dtype=chosen,
            channels_last=channels_last,
            devices=names,
            num_stages=num_stages,
            stride=split.stride,
            forecast=split.forecast,
            freshness=split.freshness,
            guidance=split.guidance,
            guidance_refresh=split.guidance_refresh,
            time_shift=split.time_shift,
            runs=runs,
            steps=steps,
            progress=report,
        )
    if json_file is not None:
        json_file.write_text(json.dumps(result.to_json(), indent=2) + "\n")
    print_table(Workload(arch, None, size, chosen, channels_last=channels_last).title, result.rows())
