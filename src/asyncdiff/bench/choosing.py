"""Fills docs/choosing.md: every way to use some devices, its predicted speed, fidelity, memory and traffic.

asyncdiff plan --arch sdxl --size 1024 --devices 8 --guidance-refresh 2,4 --json PLAN
python -m asyncdiff.bench.quality.figures --output FIDELITY
python -m asyncdiff.bench.choosing docs/choosing.md --plan PLAN --fidelity FIDELITY

The page has a pair of markers for each number of devices: `<!-- measured N: -->`, and one named `sources`,
each closed by `<!-- /measured -->`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from asyncdiff.bench import command
from asyncdiff.bench.configurations import Configuration
from asyncdiff.bench.quality import figures
from asyncdiff.bench.quality.render import cell, read_sections
from asyncdiff.bench.quality.sections import MAIN, NUM_DEVICES, REFRESH, WAYS
from asyncdiff.bench.quality.ways import Way
from asyncdiff.bench.readme import replace_measured
from asyncdiff.errors import ConfigurationError

SOURCES = "sources"
_OWN_GUIDANCE = f"{REFRESH}-50"


@dataclass(frozen=True)
class Division:
    """How devices are used: `groups` of `num_stages + stride - 1`, guidance evaluated in full at every
    `guidance_refresh`-th step."""

    num_stages: int
    stride: int
    groups: int
    guidance_refresh: int

    @property
    def title(self) -> str:
        guidance = "split" if self.groups > 1 else "together"
        return guidance if self.guidance_refresh == 1 else f"refreshed every {self.guidance_refresh} steps"

    @property
    def is_exact(self) -> bool:
        """In the picture, but for last bits."""
        return (self.num_stages, self.stride, self.guidance_refresh) == (1, 1, 1)


@dataclass(frozen=True)
class Predicted:
    """What `asyncdiff plan --json` wrote for up to as many devices."""

    values: Mapping[str, Any]

    @property
    def title(self) -> str:
        subject = self.values["arch"] or self.values["model"]
        size = self.values["size"]
        return f"{subject}{f' {size} px' if size else ''} {self.values['dtype']}"

    @property
    def total_weight_bytes(self) -> float:
        """Of the whole denoiser, which the first candidate has on one device."""
        return float(self.values["candidates"][0]["weight_bytes"][0])

    def of(self, num_devices: int) -> dict[Division, Mapping[str, Any]]:
        found = {}
        for each in self.values["candidates"]:
            is_one_step = each["warmup_steps"] == 1
            if len(each["devices"]) == num_devices and each["controlnet"] == "serial" and is_one_step:
                names = ("num_stages", "stride", "groups", "guidance_refresh")
                found[Division(*(each[name] for name in names))] = each
        return found

    def cells(self, num_devices: int, division: Division) -> list[str]:
        """Speed-up, share of the weights on the device with most of them, megabytes sent per step."""
        found = self.of(num_devices).get(division)
        if found is None:
            return ["", "", ""]
        share = max(found["weight_bytes"]) / self.total_weight_bytes
        return [f"{found['speedup']:.2f}x", f"{share:.0%}", f"{found['bytes_per_step'] / 1e6:.2f}"]

    def speedup(self, num_devices: int, division: Division) -> float:
        found = self.of(num_devices).get(division)
        return 0.0 if found is None else float(found["speedup"])

    def source(self) -> str:
        """One line: where the figures come from."""
        values = self.values
        latency_us, bandwidth_gbs = 1e6 * values["latency_s"], values["bandwidth_bytes_per_s"] / 1e9
        return (
            f"- {self.title}: `{values['command']}`. Times: {values['times']}. Link: {latency_us:.0f} us, "
            f"{bandwidth_gbs:.3g} GB/s; {values['steps']} steps; {_machine(values['environment'])}."
        )


class Fidelity:
    """The bundled models at 50 steps and their own guidance, with latents continued and fresh reads."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.content = content
        self._models = read_sections(content)

    @property
    def models(self) -> list[str]:
        return list(self._models)

    def cell(self, model: str, division: Division) -> str:
        if division.is_exact:
            return "exact"
        found = next(self._found(model, division), "")
        return found or "not measured"

    def _found(self, model: str, division: Division) -> Iterator[str]:
        """Of sections with these rows, those with more captions first."""
        configuration = f"{division.num_stages}x{division.stride}"
        refresh = division.guidance_refresh
        rule = Way(Configuration(1, 1), "latents", "auto", guidance_refresh=refresh).rule
        for name in (MAIN, _OWN_GUIDANCE, WAYS):
            section = self._models[model].get(name)
            if section is not None and (configuration, rule) in section.rows:
                yield cell(section, configuration, rule)

    def source(self) -> str:
        return f"- PSNR: `{self.content['command']}`, [fidelity](fidelity.md)."


def table(num_devices: int, plans: Sequence[Predicted], fidelity: Fidelity) -> str:
    """Every way to use so many devices, the fastest in the first plan first."""
    divisions = list(dict.fromkeys(division for plan in plans for division in plan.of(num_devices)))
    divisions.sort(key=lambda division: plans[0].speedup(num_devices, division), reverse=True)
    heads = ["guidance", "stages", "stride"]
    for plan in plans:
        heads += [f"speed-up, {plan.title}", "weights per device", "MB sent per step"]
    heads += [f"PSNR, {model}" for model in fidelity.models]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    picked = what_auto_takes(num_devices)
    for division in divisions:
        mark = " **(auto)**" if division == picked else ""
        cells = [f"{division.title}{mark}", str(division.num_stages), str(division.stride)]
        for plan in plans:
            cells += plan.cells(num_devices, division)
        cells += [fidelity.cell(model, division) for model in fidelity.models]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def what_auto_takes(num_devices: int) -> Division:
    """What `parallelize(pipe, devices)` does with a guided pipeline whose batch can be shared."""
    import torch

    from asyncdiff.pipeline.devices import settle_placement

    names = ["cpu"] * num_devices
    placement = settle_placement(names, None, 1, "spawn", torch.device("cpu"), "auto")
    if placement.split_stages is not None:
        return Division(placement.split_stages, 1, 2, 1)
    return Division(placement.num_stages, 1, 1, 1)


def fill(page: str, plans: Sequence[Predicted], fidelity: Fidelity) -> str:
    for num_devices in NUM_DEVICES:
        page = replace_measured(page, table(num_devices, plans, fidelity), str(num_devices))
    sources = "\n".join([*(plan.source() for plan in plans), fidelity.source()])
    return replace_measured(page, sources, SOURCES)


def _machine(environment: Mapping[str, Any]) -> str:
    cpu, packages = environment["devices"][0], environment["packages"]
    return f"{cpu['model']}, torch {packages['torch']}, diffusers {packages['diffusers']}"


def _read_plan(path: Path) -> Predicted:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"--plan {path}: cannot be read as JSON ({error}).") from error
    if not isinstance(values, dict) or "candidates" not in values:
        raise ConfigurationError(f"--plan {path}: was not written by asyncdiff plan --json.")
    return Predicted(values)


def choosing(
    page: Annotated[Path, typer.Argument(help="A page in Markdown with the markers.", dir_okay=False)],
    plan: Annotated[
        list[Path],
        typer.Option("--plan", metavar="FILE", help="What asyncdiff plan --json wrote. Repeatable."),
    ],
    fidelity: Annotated[
        Path,
        typer.Option("--fidelity", metavar="FILE", help="What asyncdiff.bench.quality.figures wrote."),
    ] = Path("docs/benchmarks/fidelity.json"),
) -> None:
    """Fill the tables of the page."""
    for path in (page, fidelity):
        if not path.is_file():
            raise ConfigurationError(f"{path}: is no file.")
    plans = [_read_plan(path) for path in plan]
    try:
        filled = fill(page.read_text(encoding="utf-8"), plans, Fidelity(figures.read(fidelity)))
    except ValueError as error:
        raise ConfigurationError(f"{page}: {error}") from error
    page.write_text(filled, encoding="utf-8")


if __name__ == "__main__":
    command.run_command(choosing)
