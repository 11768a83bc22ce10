"""Every figure of docs/fidelity.md: the bundled models with several samplers, guidance scales and precisions.

python -m asyncdiff.bench.quality.figures --output docs/benchmarks/fidelity.json
python -m asyncdiff.bench.quality.render docs/fidelity.md

Each section is written as soon as it is measured. What the file already has is kept where settings, sources
and versions are the same, so that a run that was broken off goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import asyncdiff
from asyncdiff.bench import command
from asyncdiff.bench.environment import installed_version
from asyncdiff.bench.loading import BUNDLED
from asyncdiff.bench.quality.sections import HALF_DTYPES, Section, sections
from asyncdiff.demo import DEMO_MODELS
from asyncdiff.errors import ConfigurationError

_DIGITS = 5
# They decide no figure, but for the files below.
_UNCOUNTED = ("bench/", "cli/", "demo/", "tiny/", "worker/")
_COUNTED = {
    "demo/__init__.py",
    "bench/loading.py",
    "bench/pictures.py",
    *(
        f"bench/quality/{name}.py"
        for name in ("measure", "metrics", "recording", "results", "speed", "subject")
    ),
}


def source_version(model: str) -> str:
    """Of everything that decides its figures: the package's sources, the bundled model, other packages."""
    root = Path(asyncdiff.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name in _COUNTED or not name.startswith(_UNCOUNTED):
            digest.update(name.encode() + path.read_bytes())
    for path in sorted(DEMO_MODELS[BUNDLED[model]].folder.rglob("*")):
        if path.is_file() and path.name != "training.json":  # how it was trained
            digest.update(path.name.encode() + path.read_bytes())
    for package in ("torch", "diffusers", "transformers", "torchmetrics"):
        digest.update(f"{package} {installed_version(package)}".encode())
    return digest.hexdigest()[:16]


def measure_section(section: Section) -> dict[str, Any]:
    """Its figures as JSON values; `failed` says what this processor cannot do in half precision."""
    from asyncdiff.bench.quality.measure import measure_quality
    from asyncdiff.bench.threads import intra_op_threads

    start = time.perf_counter()
    try:
        with intra_op_threads(1):
            result = measure_quality(section.generation, section.ways, progress=_say)
    except RuntimeError as error:
        if section.generation.dtype not in HALF_DTYPES:
            raise
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}", "ways": []}
    everything = result.to_json()
    names = ("pipeline", "scheduler", "guidance_scale", "dtype", "picture_size", "ms_ssim_scales", "link")
    shown = ("way", "split", "summary", "speed", "psnr_db", "prediction_errors", "steps_in_order")
    return {
        "failed": None,
        "seconds": time.perf_counter() - start,
        **{name: everything[name] for name in (*names, "skipped", "environment")},
        "ways": [{name: way[name] for name in shown} for way in everything["ways"]],
    }


def _say(what: str, done: int, total: int) -> None:
    if done == 0:
        typer.echo(f"  {what}", err=True)


def settings_of(section: Section) -> dict[str, Any]:
    """What has to be the same for figures to be kept."""
    generation = asdict(section.generation)
    captions = "\n".join(generation.pop("captions")).encode()
    generation |= {
        "num_captions": len(section.generation.captions),
        "captions_sha256": hashlib.sha256(captions).hexdigest()[:16],
        "scheduler_options": dict(section.generation.scheduler_options),
    }
    source = source_version(section.generation.model)
    return {"generation": generation, "ways": [str(way) for way in section.ways], "source": source}


def read(path: Path) -> dict[str, Any]:
    """What `write` wrote; without sections where there is no file."""
    if not path.exists():
        return {"command": "", "sections": {}}
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigurationError(f"{path}: is no JSON ({error}).") from error
    if not isinstance(content, dict) or "sections" not in content:
        raise ConfigurationError(f"{path}: was not written by this command.")
    return content


def write(content: dict[str, Any], path: Path) -> None:
    """At once or not at all; lists of numbers on one line."""
    text = json.dumps(_rounded(content), indent=1)
    text = re.sub(r"\[[^\[\]{}\"]*\]", lambda found: " ".join(found[0].split()), text)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text + "\n", encoding="utf-8")
    unfinished.replace(path)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value


def figures(
    output: Annotated[Path, typer.Option("--output", metavar="FILE", dir_okay=False, help="JSON.")],
    models: Annotated[str, typer.Option("--models", metavar="LIST", help="Separated by commas.")] = ",".join(
        BUNDLED
    ),
    captions: Annotated[int, typer.Option("--captions", help="Held-out captions.")] = 64,
    only: Annotated[
        str | None,
        typer.Option("--only", metavar="SECTION", help="Some of each model's, separated by commas."),
    ] = None,
) -> None:
    """Measure every section that the file does not have yet."""
    content = read(output)
    for section in _asked(output, models, captions, only):
        settings = settings_of(section)
        if content["sections"].get(section.key, {}).get("settings") == settings:
            typer.echo(f"{section.key}: kept", err=True)
            continue
        typer.echo(f"{section.key}: {section.title}, {len(section.ways)} ways", err=True)
        head = {"model": section.generation.model, "name": section.name, "title": section.title}
        measured = measure_section(section)
        content["sections"][section.key] = {**head, "settings": settings, **measured}
        if only is None or not content["command"]:
            content["command"] = " ".join(["python -m asyncdiff.bench.quality.figures", *sys.argv[1:]])
        write(content, output)
        typer.echo(f"{section.key}: {measured['failed'] or 'done'}", err=True)


def _asked(output: Path, models: str, captions: int, only: str | None) -> list[Section]:
    command.check_at_least("--captions", captions, 1)
    if not output.parent.is_dir():
        raise ConfigurationError(f"--output {output}: the folder {output.parent} does not exist.")
    names = tuple(dict.fromkeys(name.strip() for name in models.split(",")))
    for name in names:
        if name not in BUNDLED:
            raise ConfigurationError(f"--models {models}: {name!r} is none of {', '.join(BUNDLED)}.")
    found = list(sections(names, captions))
    known = dict.fromkeys(section.name for section in found)
    asked = list(known) if only is None else [name.strip() for name in only.split(",")]
    for name in asked:
        if name not in known:
            raise ConfigurationError(f"--only {name}: is none of {', '.join(known)}.")
    return [section for section in found if section.name in asked]


if __name__ == "__main__":
    command.run_command(figures)
