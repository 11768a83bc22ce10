"""`asyncdiff quality`: how close pictures of several devices are to those in order, and how fast they are."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from asyncdiff.bench.loading import BUNDLED
from asyncdiff.bench.quality.results import Generation, QualityResult
from asyncdiff.bench.quality.ways import Way, parse_ways
from asyncdiff.bench.quality.weights import LocalWeights
from asyncdiff.cli import arguments
from asyncdiff.errors import ConfigurationError

_DEFAULT_CONFIGS = "2x1,3x1,4x1,2x2,3x2"
_DEFAULT_CAPTIONS = 64
_DEFAULT_BATCH_SIZE = 16  # of the bundled models, which are small; others get one caption at a time
_WEIGHTS = "Measures that need weights of their own (never downloaded)"
_FILES = "Files"


def quality(
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", metavar="ID|FOLDER", help=f"Hub id or folder, or bundled: {', '.join(BUNDLED)}."
        ),
    ] = "demo",
    captions: Annotated[
        Path | None,
        typer.Option(
            "--captions",
            metavar="FILE",
            help="One caption a line. By default captions that the bundled models were not trained on.",
        ),
    ] = None,
    num_captions: Annotated[
        int | None,
        typer.Option(
            "--num-captions", metavar="N", help=f"The first ones. By default {_DEFAULT_CAPTIONS}, or all."
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the first picture; the next ones count up.")] = 0,
    steps: Annotated[int, typer.Option("--steps", help="Denoising steps.")] = 50,
    guidance_scale: Annotated[
        float | None, typer.Option("--guidance-scale", help="By default the model's own.")
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            "--scheduler", metavar="CLASS", help="Noise scheduler of diffusers. By default the model's own."
        ),
    ] = None,
    dtype: Annotated[
        arguments.Dtype, typer.Option("--dtype", help="'auto' is float16 on accelerators, else float32.")
    ] = "auto",
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            metavar="N",
            help=f"Captions of one call. By default {_DEFAULT_BATCH_SIZE} with the bundled models, else 1.",
        ),
    ] = None,
    devices: Annotated[
        str | None,
        typer.Option(
            "--devices",
            metavar="N|LIST",
            help="Measure on these. By default all stages run in turn on one, and speed is simulated.",
        ),
    ] = None,
    configs: Annotated[
        str | None,
        typer.Option(
            "--configs",
            metavar="LIST",
            help=f"STAGESxSTRIDE, separated by commas: {_DEFAULT_CONFIGS}, or all that fit on --devices.",
        ),
    ] = None,
    forecast: Annotated[
        str, typer.Option("--forecast", metavar="LIST", help="Of none, linear, damped, latents.")
    ] = "none,latents",
    freshness: Annotated[
        str, typer.Option("--freshness", metavar="LIST", help="Of paper, auto.")
    ] = "paper,auto",
    warmup_steps: Annotated[
        str,
        typer.Option("--warmup-steps", metavar="LIST", help="Steps run in order first: 1, or 1,3, or auto."),
    ] = "1",
    guidance_refresh: Annotated[
        str,
        typer.Option(
            "--guidance-refresh",
            metavar="LIST",
            help="Both halves of guidance at every so many steps: 1, or 1,2,4; above 1 with forecast "
            "'latents' and stride 1.",
        ),
    ] = "1",
    lpips_weights: Annotated[
        Path | None,
        typer.Option(
            "--lpips-weights", metavar="FILE", rich_help_panel=_WEIGHTS, help="torchvision's AlexNet."
        ),
    ] = None,
    clip_score_weights: Annotated[
        Path | None,
        typer.Option(
            "--clip-score-weights", metavar="FOLDER", rich_help_panel=_WEIGHTS, help="CLIP of transformers."
        ),
    ] = None,
    fid_weights: Annotated[
        Path | None,
        typer.Option(
            "--fid-weights", metavar="FILE", rich_help_panel=_WEIGHTS, help="torch-fidelity's Inception."
        ),
    ] = None,
    fid_images: Annotated[
        Path | None,
        typer.Option(
            "--fid-images", metavar="FOLDER", rich_help_panel=_WEIGHTS, help="1000 real pictures or more."
        ),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", rich_help_panel=_FILES, help="Every figure of every picture."),
    ] = None,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", rich_help_panel=_FILES, help="A row per setting.")
    ] = None,
    html_file: Annotated[
        Path | None,
        typer.Option(
            "--html", metavar="FILE", rich_help_panel=_FILES, help="A page with plots and pictures."
        ),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(
            "--picture",
            metavar="FILE",
            rich_help_panel=_FILES,
            help="Some pictures in order, of every setting, and their differences.",
        ),
    ] = None,
    debug: arguments.DebugOption = False,
) -> None:
    """Compare pictures of every combination of settings with those in order: fidelity beside speed."""
    arguments.check_at_least("--steps", steps, 2)
    arguments.check_at_least("--batch-size", batch_size, 1)
    arguments.check_guidance_scale(guidance_scale)
    arguments.check_seed(seed)
    if model not in BUNDLED:
        arguments.check_model(model)
    outputs = Outputs(json_file, csv_file, html_file, picture)
    outputs.check()
    asked = None if devices is None else arguments.parse_devices(devices)
    count = asked if isinstance(asked, int) else None if asked is None else len(asked)
    ways = parse_ways(
        configs or (_DEFAULT_CONFIGS if count is None else "auto"),
        forecast,
        freshness,
        warmup_steps,
        count,
        guidance_refresh=guidance_refresh,
    )
    texts = _captions(model, captions, num_captions)
    weights = LocalWeights(lpips_weights, clip_score_weights, fid_weights, fid_images)
    weights.check(len(texts))
    if importlib.util.find_spec("torchmetrics") is None:
        raise ConfigurationError("`asyncdiff quality` needs torchmetrics: pip install 'asyncdiff[bench]'.")
    generation = Generation(
        model=model,
        captions=texts,
        seed=seed,
        steps=steps,
        guidance_scale=guidance_scale,
        scheduler=scheduler,
        dtype=dtype,
        batch_size=batch_size or (_DEFAULT_BATCH_SIZE if model in BUNDLED else 1),
    )
    _run(generation, ways, asked, weights, outputs)


@dataclass(frozen=True)
class Outputs:
    """Files to write, where asked for."""

    json_file: Path | None
    csv_file: Path | None
    html_file: Path | None
    picture: Path | None

    def check(self) -> None:
        """Before anything is generated."""
        arguments.check_writable("--json", self.json_file, (".json",))
        arguments.check_writable("--csv", self.csv_file, (".csv",))
        arguments.check_writable("--html", self.html_file, (".html", ".htm"))
        arguments.check_writable("--picture", self.picture, arguments.IMAGE_SUFFIXES)
        if self.html_file is not None and importlib.util.find_spec("matplotlib") is None:
            raise ConfigurationError("--html needs matplotlib: pip install 'asyncdiff[bench]'.")

    def write(self, result: QualityResult) -> list[Path]:
        """The files written."""
        from asyncdiff.bench.quality.tables import write_csv

        if self.json_file is not None:
            self.json_file.write_text(json.dumps(result.to_json(), indent=2) + "\n", encoding="utf-8")
        if self.csv_file is not None:
            write_csv(result, self.csv_file)
        if self.html_file is not None:
            from asyncdiff.bench.quality.page import page

            self.html_file.write_text(page(result), encoding="utf-8")
        if self.picture is not None:
            result.grid.save(self.picture)
        files = (self.json_file, self.csv_file, self.html_file, self.picture)
        return [path for path in files if path is not None]


def _captions(model: str, file: Path | None, count: int | None) -> tuple[str, ...]:
    """Those of the file, or held-out ones of the bundled models; `ConfigurationError` for none or too few."""
    arguments.check_at_least("--num-captions", count, 1)
    if file is None:
        if model not in BUNDLED:
            raise ConfigurationError(f"--model {model}: give --captions FILE, one caption a line.")
        from asyncdiff.demo import held_out_captions

        try:
            return tuple(held_out_captions(count or _DEFAULT_CAPTIONS))
        except ValueError as error:
            raise ConfigurationError(f"--num-captions {count}: {error}") from error
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"--captions {file}: cannot be read ({error}).") from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise ConfigurationError(f"--captions {file}: has no captions. Write one a line.")
    if count is not None and count > len(found):
        raise ConfigurationError(f"--num-captions {count}: {file} has {len(found)}.")
    return tuple(found[: count or _DEFAULT_CAPTIONS])


def _run(
    generation: Generation,
    ways: tuple[Way, ...],
    asked: int | tuple[str, ...] | None,
    weights: LocalWeights,
    outputs: Outputs,
) -> None:
    """Generate, compare, write the files and print the tables."""
    from asyncdiff.cli.console import print_report, progress, quiet_libraries
    from asyncdiff.cli.devices import resolve_devices

    names = resolve_devices(1 if asked is None else asked)
    quiet_libraries()
    with progress("Starting") as report:
        from asyncdiff.bench.quality.measure import measure_quality
        from asyncdiff.bench.quality.tables import facts, tables

        result = measure_quality(
            generation,
            ways,
            names,
            simulated=asked is None,
            weights=weights,
            progress=report,
        )
    print_report(tables(result), facts(result), outputs.write(result))
