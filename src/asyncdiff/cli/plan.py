"""`asyncdiff plan`: what every way to use some devices would bring, before anything runs."""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from asyncdiff.cli import arguments
from asyncdiff.cli.arguments import Dtype, Forecast, Freshness
from asyncdiff.config import Settings
from asyncdiff.errors import ConfigurationError
from asyncdiff.planner import (
    USUAL_STALENESS,
    Candidate,
    ControlNetCandidates,
    Objective,
    Plan,
    choose_candidate,
    explain_choice,
    list_candidates,
)
from asyncdiff.simulation import Machine

if TYPE_CHECKING:
    from asyncdiff.bench.progress import Progress
    from asyncdiff.cli.plan_subject import Request
    from asyncdiff.pipeline.controlnet_cost import ExaminedControlNet
    from asyncdiff.pipeline.examination import Examination

_LINK = "Link between devices"
_TIMES = "Times"
_OBJECTIVE = "What to choose"
_DEFAULT_MACHINE = "pcie4"
_DEFAULT_ARCH = "sd21"


def plan(
    arch: Annotated[
        str | None,
        typer.Option("--arch", help=f"Denoiser, by name: sd15, sd21, sdxl, sd3 ... ({_DEFAULT_ARCH})."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="ID|FOLDER", help="Instead: that of this pipeline.")
    ] = None,
    size: Annotated[
        int | None, typer.Option("--size", metavar="PIXELS", help="Height and width of the picture.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option("--dtype", help="Of the weights.")] = "auto",
    steps: Annotated[int, typer.Option("--steps", help="Steps of the run.")] = 50,
    devices: arguments.DevicesOption = None,
    speeds: Annotated[
        str | None,
        typer.Option(
            "--speeds",
            metavar="LIST",
            help="Of each device, 1 for one like the first: 1,0.5. By default equal.",
        ),
    ] = None,
    machine: Annotated[
        Literal["nvlink", "pcie4", "pcie3", "10gbe"] | None,
        typer.Option("--machine", rich_help_panel=_LINK, help=f"Usual figures ({_DEFAULT_MACHINE})."),
    ] = None,
    latency_us: Annotated[
        float | None,
        typer.Option("--latency-us", metavar="US", rich_help_panel=_LINK, help="Of a small message."),
    ] = None,
    bandwidth_gbs: Annotated[
        float | None,
        typer.Option("--bandwidth-gbs", metavar="GB/S", rich_help_panel=_LINK, help="Gigabytes per second."),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option("--measure", rich_help_panel=_LINK, help="Measure it between the devices of --devices."),
    ] = False,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile",
            rich_help_panel=_TIMES,
            help="Time every block on the first device instead of estimating; needs room for all weights.",
        ),
    ] = False,
    times: Annotated[
        Path | None,
        typer.Option(
            "--times",
            metavar="FILE",
            rich_help_panel=_TIMES,
            help="Milliseconds of blocks by name, or what --json wrote with --profile (on another machine).",
        ),
    ] = None,
    warmup_steps: Annotated[
        str,
        typer.Option(
            "--warmup-steps",
            metavar="LIST",
            help="Steps run in order first: 1, or several to compare: 1,3,5.",
        ),
    ] = "1",
    time_shift: arguments.TimeShiftOption = False,
    forecast: arguments.ForecastOption = "latents",
    freshness: arguments.FreshnessOption = "auto",
    guidance_refresh: Annotated[
        str | None,
        typer.Option(
            "--guidance-refresh",
            metavar="LIST",
            help="Also with both halves of guidance evaluated at every so many steps only: 2, or 2,4. It "
            "changes the picture, so it is not tried unless asked for.",
        ),
    ] = None,
    max_staleness: Annotated[
        int,
        typer.Option(
            "--max-staleness",
            metavar="STEPS",
            rich_help_panel=_OBJECTIVE,
            help="The fastest whose predictions rest on latents no older than that.",
        ),
    ] = USUAL_STALENESS,
    max_memory: Annotated[
        float | None,
        typer.Option(
            "--max-memory",
            metavar="GB",
            rich_help_panel=_OBJECTIVE,
            help="The fastest with no more of the denoiser's weights on any device.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="FILE", help="Write the chosen plan for parallelize(plan=...)."
        ),
    ] = None,
    json_file: arguments.JsonOption = None,
    debug: arguments.DebugOption = False,
) -> None:
    """Predict time, memory, traffic and staleness of every way to use some devices, and choose one."""
    arguments.check_size("--size", size)
    arguments.check_at_least("--steps", steps, 1)
    arguments.check_writable("-o", output, (".json",))
    arguments.check_writable("--json", json_file, (".json",))
    arguments.check_at_least("--max-staleness", max_staleness, 0)
    _check_positive("--max-memory", max_memory)
    if arch is not None and model is not None:
        raise ConfigurationError(f"--arch {arch} and --model {model} were given: leave one of them out.")
    if model is not None:
        arguments.check_model(model)
    asked = None if devices is None else arguments.parse_devices(devices)
    given_speeds = None if speeds is None else _parse_speeds(speeds, asked)
    link = _Link(machine, latency_us, bandwidth_gbs, measure)
    link.check()
    if profile and times is not None:
        raise ConfigurationError("--profile measures what --times gives: leave one of them out.")
    block_times = None if times is None else _read_times(times)
    warmups = _parse_counts("--warmup-steps", warmup_steps, 1)
    refreshes = () if guidance_refresh is None else _parse_counts("--guidance-refresh", guidance_refresh, 2)
    if refreshes:
        arguments.check_split(
            devices, None, 1, "1", None, time_shift, forecast, freshness, guidance_refresh=refreshes[0]
        )
    objective = Objective(max_staleness, None if max_memory is None else max_memory * 1e9)

    from asyncdiff.cli.console import progress, quiet_libraries
    from asyncdiff.cli.plan_subject import Request

    request = Request(arch or (None if model else _DEFAULT_ARCH), model, size, dtype)
    names = _device_names(asked, on_this_machine=profile or measure)
    if given_speeds is not None and len(given_speeds) != len(names):
        raise ConfigurationError(f"--speeds {speeds}: {len(names)} devices need {len(names)} speeds.")
    quiet_libraries()
    with progress("Starting") as report:
        basis = _basis(request, names, given_speeds, block_times, profile=profile, report=report)
        device_speeds = basis.speeds or (1.0,) * len(names)
        described = link.machine(device_speeds, names, report)
        report("Comparing", 0, 0)
        wish = _Wish(names, time_shift, forecast, freshness, objective)
        candidates = list_candidates(
            functools.partial(wish.plan, basis),
            described,
            steps,
            warmups,
            refreshes,
            wish.beside_controlnet(basis),
        )
    chosen = choose_candidate(candidates, objective)
    reason = explain_choice(chosen, candidates, objective)
    if output is not None:
        chosen.plan.save(output)
    if json_file is not None:
        content = _to_json(request, basis, described, steps, candidates, chosen, reason)
        json_file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _show(request, basis, link, described, steps, candidates, chosen, objective)
    typer.echo(reason)


@dataclass(frozen=True)
class _Times:
    """Milliseconds of blocks by name, also with half a batch where that was measured, and of the pipeline's
    own work per step and of a ControlNet's call where they are known."""

    block_ms: dict[str, float]
    driver_ms: float | None
    part_block_ms: dict[str, float] | None
    controlnet_ms: float | None = None


@dataclass(frozen=True)
class _Basis:
    """What plans are made from. `source`: where the seconds come from, for people. `part`: one of two parts
    of the batch, None where it cannot be shared; `part_seconds`: as `seconds`, of it. `controlnet`: called
    before the denoiser, `controlnet_seconds` of a call."""

    examination: Examination
    source: str
    threads: int | None
    speeds: tuple[float, ...] | None
    seconds: dict[Any, float] | None = None
    driver_seconds: float | None = None
    part: Examination | None = None
    part_seconds: dict[Any, float] | None = None
    controlnet: ExaminedControlNet | None = None
    controlnet_seconds: float = 0.0

    def examined(self, parts: int) -> tuple[Examination, dict[Any, float] | None]:
        """What computes one of so many parts of the batch, with its seconds; `ConfigurationError` where it
        cannot be shared."""
        if parts == 1:
            return self.examination, self.seconds
        if self.part is None:
            raise ConfigurationError("The batch of the denoiser's call cannot be shared.")
        return self.part, self.part_seconds


@dataclass(frozen=True)
class _Wish:
    """What is common to all candidates."""

    names: Sequence[str]
    time_shift: bool
    forecast: Forecast
    freshness: Freshness
    objective: Objective

    def beside_controlnet(self, basis: _Basis) -> ControlNetCandidates | None:
        """With a device for the ControlNet; None where there is none."""
        controlnet = basis.controlnet
        if controlnet is None:
            return None
        without = replace(basis, controlnet=None)
        return ControlNetCandidates(
            lambda num_stages, stride, groups: self.plan(without, num_stages, stride, groups, 1),
            lambda groups: controlnet.cost(basis.controlnet_seconds, *basis.examined(groups)),
        )

    def plan(self, basis: _Basis, num_stages: int, stride: int, groups: int, guidance_refresh: int) -> Plan:
        """The best plan within the memory limit, else the best without; `ConfigurationError` for groups and
        halves of guidance where the batch cannot be shared. The ControlNet is the driver's own work."""
        found = self._plan(basis, num_stages, stride, groups, guidance_refresh)
        if basis.controlnet is None:
            return found
        assert found.predictions is not None
        driver_seconds = found.predictions.driver_seconds + basis.controlnet_seconds
        with_it = replace(basis, driver_seconds=driver_seconds)
        return self._plan(with_it, num_stages, stride, groups, guidance_refresh)

    def _plan(self, basis: _Basis, num_stages: int, stride: int, groups: int, guidance_refresh: int) -> Plan:
        settings = Settings(
            num_stages,
            stride,
            1,
            self.time_shift,
            self.forecast,
            self.freshness,
            groups=groups,
            guidance_refresh=guidance_refresh,
        )
        examination, seconds = basis.examined(1 if groups == guidance_refresh == 1 else 2)

        def make(max_weight_bytes: float) -> Plan:
            count = settings.num_workers
            return examination.plan_with(
                settings,
                self.names[:count],
                threads_per_device=basis.threads,
                seconds=seconds,
                driver_seconds=basis.driver_seconds,
                speeds=None if basis.speeds is None else basis.speeds[:count],
                max_weight_bytes=max_weight_bytes,
            )

        limit = self.objective.max_memory_bytes
        if limit is not None and num_stages > 1:
            try:
                return make(limit)
            except ConfigurationError:
                pass  # shown all the same, as what it is
        return make(math.inf)


@dataclass(frozen=True)
class _Link:
    """What was said about the link."""

    preset: str | None
    latency_us: float | None
    bandwidth_gbs: float | None
    measure: bool

    def check(self) -> None:
        if self.latency_us is not None and not 0 <= self.latency_us < math.inf:
            raise ConfigurationError(f"--latency-us {self.latency_us:g}: must be 0 or more.")
        _check_positive("--bandwidth-gbs", self.bandwidth_gbs)
        if self.measure and (self.preset, self.latency_us, self.bandwidth_gbs) != (None, None, None):
            raise ConfigurationError(
                "--measure measures the link: leave --machine, --latency-us and --bandwidth-gbs out."
            )

    def machine(self, speeds: tuple[float, ...], names: Sequence[str], report: Progress) -> Machine:
        """The machine to predict for; the slowest of its links where several are measured."""
        if self.measure and len(names) > 1:
            from asyncdiff.bench.link import measure_links

            report("Measuring the link", 0, 0)
            links = measure_links(names)
            latency_s = max(link.latency_s for link in links)
            return Machine(speeds, latency_s, min(link.bandwidth_bytes_per_s for link in links))
        usual = replace(Machine.preset(self.preset or _DEFAULT_MACHINE, len(speeds)), device_speeds=speeds)
        if self.latency_us is not None:
            usual = replace(usual, latency_s=self.latency_us / 1e6)
        if self.bandwidth_gbs is not None:
            usual = replace(usual, bandwidth_bytes_per_s=self.bandwidth_gbs * 1e9)
        return usual

    @property
    def title(self) -> str:
        if self.measure:
            return "measured"
        is_by_hand = self.latency_us is not None and self.bandwidth_gbs is not None
        return "as given" if is_by_hand else self.preset or _DEFAULT_MACHINE


def _basis(
    request: Request,
    names: Sequence[str],
    speeds: tuple[float, ...] | None,
    times: _Times | None,
    *,
    profile: bool,
    report: Progress,
) -> _Basis:
    from asyncdiff.cli import plan_subject

    threads = plan_subject.threads_per_device(names)
    if profile:
        looked, measured = plan_subject.measure(request, names, threads, report)
        return _Basis(
            looked.whole,
            f"measured on {names[0]}",
            threads,
            speeds or measured.speeds,
            dict(measured.profile.block_seconds),
            measured.profile.driver_seconds,
            looked.part,
            None if measured.part_seconds is None else dict(measured.part_seconds),
            looked.controlnet,
            measured.controlnet_seconds or 0.0,
        )
    looked = plan_subject.look_at(request, names[0], report)
    controlnet = looked.controlnet
    if times is None:
        source = "estimated from FLOPs and bytes: compare them, do not believe them (--profile measures)"
        controlnet_seconds = 0.0 if controlnet is None else controlnet.estimated_seconds(_kind(names[0]))
        return _Basis(
            looked.whole,
            source,
            threads,
            speeds,
            part=looked.part,
            controlnet=controlnet,
            controlnet_seconds=controlnet_seconds,
        )
    seconds = plan_subject.given_seconds(looked.whole, times.block_ms, names[0])
    part_seconds = None
    if looked.part is not None:
        given = times.part_block_ms or {name: value / 2 for name, value in times.block_ms.items()}
        part_seconds = plan_subject.given_seconds(looked.part, given, names[0])
    is_halved = looked.part is not None and times.part_block_ms is None
    source = "as given" + (", and half of it for half a batch" if is_halved else "")
    driver_seconds = None if times.driver_ms is None else times.driver_ms / 1e3
    if controlnet is not None and times.controlnet_ms is None:
        controlnet, source = None, source + "; without the ControlNet, for which there is no controlnet_ms"
    return _Basis(
        looked.whole,
        source,
        threads,
        speeds,
        seconds,
        driver_seconds,
        looked.part,
        part_seconds,
        controlnet,
        (times.controlnet_ms or 0.0) / 1e3,
    )


def _kind(device: str) -> str:
    return device.split(":")[0]


def _device_names(asked: int | tuple[str, ...] | None, *, on_this_machine: bool) -> list[str]:
    """The devices' names; devices that are not here can be planned for, but not measured."""
    from asyncdiff.cli.devices import resolve_devices

    if on_this_machine or asked is None:
        return resolve_devices(asked)
    if isinstance(asked, int):
        import torch

        return [f"cuda:{i}" if torch.cuda.is_available() else "cpu" for i in range(asked)]
    return list(asked)


def _check_positive(option: str, value: float | None) -> None:
    if value is not None and not 0 < value < math.inf:
        raise ConfigurationError(f"{option} {value:g}: must be above 0.")


def _parse_speeds(text: str, devices: int | tuple[str, ...] | None) -> tuple[float, ...]:
    try:
        speeds = tuple(float(part) for part in text.split(","))
    except ValueError:
        speeds = ()
    if not speeds or not all(0 < speed < math.inf for speed in speeds):
        raise ConfigurationError(
            f"--speeds {text}: must be numbers above 0, separated by commas, such as 1,0.5."
        )
    count = devices if isinstance(devices, int) or devices is None else len(devices)
    if count is not None and len(speeds) != count:
        raise ConfigurationError(f"--speeds {text}: {count} devices need {count} speeds.")
    return speeds


def _parse_counts(option: str, text: str, least: int) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= least for part in parts):
        raise ConfigurationError(
            f"{option} {text}: must be {least} or more, or several such numbers separated by commas."
        )
    return tuple(dict.fromkeys(map(int, parts)))


def _read_times(path: Path) -> _Times:
    """`{"conv_in": 1.5, ...}`, or an object with such a one as `block_ms`; `ConfigurationError` else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"--times {path}: cannot be read as JSON ({error}).") from error
    is_ours = isinstance(content, dict) and "block_ms" in content
    block_ms = content["block_ms"] if is_ours else content
    driver_ms = content.get("driver_ms") if is_ours else None
    if not isinstance(block_ms, dict) or not block_ms or not all(map(_is_duration, block_ms.values())):
        raise ConfigurationError(
            f"--times {path}: must be an object of block names and milliseconds, or what --json wrote with "
            "--profile."
        )
    controlnet_ms = content.get("controlnet_ms") if is_ours else None
    for name, value in (("driver_ms", driver_ms), ("controlnet_ms", controlnet_ms)):
        if value is not None and not _is_duration(value):
            raise ConfigurationError(f"--times {path}: {name} must be milliseconds, not {value!r}.")
    part_ms = content.get("part_block_ms") if is_ours else None
    if part_ms is not None and not (isinstance(part_ms, dict) and all(map(_is_duration, part_ms.values()))):
        raise ConfigurationError(f"--times {path}: part_block_ms must be of block names and milliseconds.")
    given = {name: float(value) for name, value in block_ms.items()}
    return _Times(given, driver_ms, part_ms or None, controlnet_ms)


def _is_duration(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _to_json(
    request: Request,
    basis: _Basis,
    machine: Machine,
    steps: int,
    candidates: Sequence[Candidate],
    chosen: Candidate,
    reason: str,
) -> dict[str, Any]:
    from asyncdiff.bench.environment import describe_environment

    block_ms = {str(key): 1e3 * seconds for key, seconds in (basis.seconds or {}).items()}
    part_ms = {str(key): 1e3 * seconds for key, seconds in (basis.part_seconds or {}).items()}
    driver_ms = None if basis.driver_seconds is None else 1e3 * basis.driver_seconds
    return {
        "arch": request.arch,
        "model": request.model,
        "size": request.size,
        "dtype": str(basis.examination.dtype).removeprefix("torch."),
        "steps": steps,
        "times": basis.source,
        "device_speeds": list(machine.device_speeds),
        "latency_s": machine.latency_s,
        "bandwidth_bytes_per_s": machine.bandwidth_bytes_per_s,
        "candidates": [_candidate_json(each, is_chosen=each is chosen) for each in candidates],
        **({"block_ms": block_ms} if block_ms else {}),
        **({"part_block_ms": part_ms} if part_ms else {}),
        "driver_ms": driver_ms,
        **({} if basis.controlnet is None else {"controlnet_ms": 1e3 * basis.controlnet_seconds}),
        "reason": reason,
        "environment": describe_environment(),
        "command": " ".join(["asyncdiff", *sys.argv[1:]]),
    }


def _candidate_json(candidate: Candidate, *, is_chosen: bool) -> dict[str, Any]:
    plan = candidate.plan
    return {
        "controlnet": candidate.controlnet,
        "groups": plan.groups,
        "guidance_refresh": plan.guidance_refresh,
        "num_stages": plan.num_stages,
        "stride": plan.stride,
        "warmup_steps": plan.warmup_steps,
        "kind": plan.kind,
        "devices": list(plan.devices),
        "total_s": candidate.total_s,
        "speedup": candidate.speedup,
        "weight_bytes": list(candidate.weight_bytes),
        "bytes_per_step": candidate.bytes_per_step,
        "staleness": candidate.staleness,
        "read_staleness": candidate.read_staleness,
        "is_chosen": is_chosen,
    }


def _show(
    request: Request,
    basis: _Basis,
    link: _Link,
    machine: Machine,
    steps: int,
    candidates: Sequence[Candidate],
    chosen: Candidate,
    objective: Objective,
) -> None:
    from asyncdiff.bench.command import show_table

    heads = [
        "", "guidance", "stages", "stride", "warm-up", "devices", f"{steps} steps", "speed-up",
        "weights per device", "sent per step", "staleness", "split",
    ]  # fmt: skip
    dtype = str(basis.examination.dtype).removeprefix("torch.")
    rows = [list(_row(each, is_chosen=each is chosen, objective=objective)) for each in candidates]
    if basis.controlnet is not None:
        heads.insert(1, "ControlNet")
        for row, each in zip(rows, candidates, strict=True):
            row.insert(1, each.controlnet)
    show_table(f"{request.title}, {dtype}", heads, rows)
    bandwidth = machine.bandwidth_bytes_per_s / 1e9
    typer.echo(f"Times: {basis.source}.")
    typer.echo(f"Link: {link.title}, {machine.latency_s * 1e6:.0f} us, {bandwidth:.3g} GB/s.")
    if chosen.controlnet != "serial":
        typer.echo(
            f"ControlNet: its device comes after those of the plan: parallelize(pipe, [...], plan=..., "
            f'controlnet="{chosen.controlnet}").'
        )
    if len(set(machine.device_speeds)) > 1:
        typer.echo(f"Speeds: {', '.join(f'{speed:.3g}' for speed in machine.device_speeds)}.")


def _row(candidate: Candidate, *, is_chosen: bool, objective: Objective) -> tuple[str, ...]:
    plan = candidate.plan
    is_alone = candidate.num_devices == 1 and plan.guidance_refresh == 1
    guidance = "split" if plan.groups > 1 else "together"
    if plan.guidance_refresh > 1:
        guidance = f"every {plan.guidance_refresh}"
    largest = max(candidate.weight_bytes)
    too_large = "" if objective.is_small_enough(candidate) else " !"
    too_stale = "" if objective.is_fresh_enough(candidate) else " !"
    return (
        "->" if is_chosen else "",
        "" if is_alone else guidance,
        "in order" if is_alone else str(plan.num_stages),
        "" if is_alone else str(plan.stride),
        "" if is_alone else str(plan.warmup_steps),
        str(candidate.num_devices),
        f"{candidate.total_s:.3g} s",
        f"{candidate.speedup:.2f}x",
        (f"{largest / 1e9:.2f} GB" if largest >= 1e8 else f"{largest / 1e6:.2f} MB") + too_large,
        f"{candidate.bytes_per_step / 1e6:.2f} MB",
        f"{candidate.staleness}{too_stale}",
        "" if is_alone else plan.kind,
    )
