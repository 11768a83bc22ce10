"""`asyncdiff doctor`: what is here, what works here, what to install; and whether a model can be divided."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from asyncdiff.bench.progress import Progress
from asyncdiff.cli import arguments
from asyncdiff.errors import ConfigurationError


@dataclass(frozen=True)
class Check:
    """One way of running: whether it works here, and what to know or to do."""

    name: str
    works: bool
    note: str


def doctor(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="ID|FOLDER",
            help="Instead: whether this pipeline's denoisers can be divided, and where they would be cut.",
        ),
    ] = None,
    stages: Annotated[
        int | None, typer.Option("--stages", metavar="N", help="With --model: parts to cut it into (2).")
    ] = None,
    json_file: arguments.JsonOption = None,
    debug: arguments.DebugOption = False,
) -> None:
    """Show versions and devices, and try out what works on this machine (exit code 1 if nothing does).

    With --model: exit code 0 if every denoiser can be divided, 1 if not. Weights are loaded only where the
    configs do not settle it.
    """
    arguments.check_writable("--json", json_file, (".json",))
    arguments.check_at_least("--stages", stages, 2)
    if model is not None:
        arguments.check_model(model)
        _show_verdict(model, stages or 2, json_file)
    elif stages is not None:
        raise ConfigurationError(f"--stages {stages}: is for --model, which was not given.")
    else:
        _show_machine(json_file)


def _show_verdict(model: str, num_stages: int, json_file: Path | None) -> None:
    from asyncdiff.cli.console import print_table, progress, quiet_libraries
    from asyncdiff.cli.model_check import check_model

    quiet_libraries()
    with progress(f"Looking at {model}") as report:
        verdict = check_model(model, num_stages, report)
    if json_file is not None:
        json_file.write_text(json.dumps(asdict(verdict), indent=2) + "\n")
    print_table(model, verdict.rows())
    if not verdict.can_be_divided:
        raise typer.Exit(1)


def _show_machine(json_file: Path | None) -> None:
    from asyncdiff.bench.environment import describe_environment
    from asyncdiff.cli.console import print_table, progress

    with progress("Looking around") as report:
        report("Looking for devices", 0, 0)
        environment = describe_environment()
        missing = missing_packages()
        checks = run_checks(environment["devices"], missing, report)
    findings = {**environment, "missing": missing, "checks": [asdict(check) for check in checks]}
    if json_file is not None:
        json_file.write_text(json.dumps(findings, indent=2) + "\n")
    print_table("Versions", list(_version_rows(environment)))
    print_table("\nDevices", [_device_row(device) for device in environment["devices"]])
    print_table(
        "\nWhat works", [(check.name, "yes" if check.works else "no", check.note) for check in checks]
    )
    for requirement in missing:
        typer.echo(f"\nTo install: pip install '{requirement}'")
    if not any(check.works for check in checks):
        raise typer.Exit(1)


def missing_packages() -> list[str]:
    """The requirements of asyncdiff itself, without extras, that are not there or too old."""
    from packaging.requirements import Requirement

    from asyncdiff.bench.environment import installed_version

    missing = []
    for line in metadata.requires("asyncdiff") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = installed_version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            missing.append(f"{requirement.name}{requirement.specifier}")
    return missing


def run_checks(devices: list[dict[str, Any]], missing: list[str], report: Progress) -> list[Check]:
    """Try every way of running that this machine could have."""
    if any(requirement.startswith(("torch>", "diffusers>")) for requirement in missing):
        return [Check("local", False, "needs torch and diffusers, see below")]
    from asyncdiff.launch import probe

    num_cuda = sum(device["kind"] == "cuda" for device in devices)
    backends = probe.built_backends()
    checks = [Check("local: all stages in one process, one after the other", True, "needs one device")]
    report("Two CPU processes exchange a tensor (gloo)", 0, 0)
    cpu = probe.round_trip("gloo", ("cpu", "cpu"))
    checks.append(Check("spawn on CPUs (gloo)", cpu.works, cpu.why_not or _cores_note(devices)))
    if num_cuda >= 2 and "nccl" in backends:
        report("Two CUDA processes exchange a tensor (nccl)", 0, 0)
        cuda = probe.round_trip("nccl", ("cuda:0", "cuda:1"))
        checks.append(
            Check("spawn on CUDA devices (nccl)", cuda.works, cuda.why_not or f"{num_cuda} devices")
        )
    else:
        checks.append(Check("spawn on CUDA devices (nccl)", False, _no_cuda_note(num_cuda, backends)))
    report("Two CPU processes under torchrun exchange a tensor", 0, 0)
    torchrun = probe.torchrun_round_trip()
    checks.append(Check("torchrun", torchrun.works, torchrun.why_not))
    return checks


def _cores_note(devices: list[dict[str, Any]]) -> str:
    cores = next(device["cores"] for device in devices if device["kind"] == "cpu")
    return f"{cores} cores" if cores > 1 else "one core only: it works, but nothing is gained"


def _no_cuda_note(num_cuda: int, backends: list[str]) -> str:
    if num_cuda == 0:
        return "no CUDA device seen by torch" + (
            "" if "nccl" in backends else "; this torch is built without CUDA"
        )
    if num_cuda == 1:
        return "one CUDA device; cuda:0,cuda:0 works through host memory, but nothing is gained"
    return "this torch is built without nccl: install a CUDA build of torch"


def _version_rows(environment: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    yield "python", environment["python"], environment["platform"]
    for name, version in environment["packages"].items():
        yield name, version or "-", "" if version else "not installed"


def _device_row(device: dict[str, Any]) -> tuple[str, str, str]:
    cores = f", {device['cores']} cores" if "cores" in device else ""
    return device["name"], f"{device['memory_bytes'] / 2**30:.1f} GiB", device["model"] + cores
