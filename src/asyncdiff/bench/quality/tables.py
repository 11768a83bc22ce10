"""The result as tables of text: for the terminal, for the page, and as CSV."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

from asyncdiff.bench.quality.results import QualityResult, WayQuality
from asyncdiff.bench.runs.tables import Table, environment_rows

_WAY_HEADS = (
    "configuration",
    "num_stages",
    "stride",
    "warmup_steps",
    "forecast",
    "freshness",
    "guidance_refresh",
    "split",
    "devices",
)


def tables(result: QualityResult) -> list[Table]:
    """Fidelity and speed; pictures by themselves where they were judged; what was refused."""
    found = [_fidelity(result), _errors(result)]
    if result.in_order.clip_score is not None or result.in_order.fid is not None:
        found.append(_judgements(result))
    refused = [(each.name, each.reason) for each in result.skipped]
    refused += [(str(each.way), each.speed_missing) for each in result.ways if each.speed_missing]
    if refused:
        found.append(Table("Not available for this model", ("what", "why"), tuple(refused)))
    return found


def facts(result: QualityResult) -> list[tuple[str, str]]:
    """How it was measured, machine, versions and command."""
    generation = result.generation
    last = generation.seed + len(generation.captions) - 1
    guidance = "the pipeline's own" if result.guidance_scale is None else f"{result.guidance_scale:g}"
    where = ", ".join(result.devices)
    if result.link:
        where += f"; speed simulated for devices like it, linked by {result.link}"
    if result.threads_per_device:
        where += f"; threads each: {result.threads_per_device}"
    width, height = result.picture_size
    return [
        ("command", result.command),
        ("model", f"{generation.model} ({result.pipeline}), {result.dtype}"),
        ("run", f"{generation.steps} steps, {result.scheduler}, guidance {guidance}"),
        (
            "pictures",
            f"{len(generation.captions)} captions, seeds {generation.seed} to {last}, {width} x {height} "
            f"pixels, {generation.batch_size} in a batch",
        ),
        ("devices", where),
        *environment_rows(result.environment),
    ]


def ms_ssim_head(scales: int) -> str:
    """Says of how many scales it is."""
    return "MS-SSIM" if scales in (0, 5) else f"MS-SSIM ({scales} of 5 scales)"


def speed_head(result: QualityResult) -> str:
    return "speed-up, simulated" if result.link else "speed-up, measured"


def _fidelity(result: QualityResult) -> Table:
    heads = (
        "stages x stride", "reads", "steps in order", "split", "devices", speed_head(result),
        "PSNR", "worst tenth", "worst", "SSIM", ms_ssim_head(result.ms_ssim_scales), "LPIPS",
    )  # fmt: skip
    rows = tuple(
        (
            str(each.way.configuration),
            each.way.rule,
            steps_in_order_text(each),
            each.split,
            str(each.num_devices),
            "-" if each.speed is None else f"{each.speed.speedup:.2f}x",
            decibels(each.psnr_mean_db),
            decibels(each.psnr_worst_tenth_db),
            decibels(each.psnr_lowest_db),
            _digits(each.summary()["ssim"], 4),
            _digits(each.summary()["ms_ssim"], 4, "too small"),
            _digits(each.summary()["lpips"], 4, result.lpips_missing),
        )
        for each in result.ways
    )
    return Table(
        f"Pictures against in order: {result.title}",
        heads,
        rows,
        "PSNR of decoded 8-bit pictures, mean over those that differ; worst tenth: the mean of the worst "
        "tenth; SSIM, MS-SSIM: 1 is equal; LPIPS: 0 is equal. steps in order: of the warm-up. "
        "Speed-up: of the denoising of one batch against one device in order.",
    )


def _errors(result: QualityResult) -> Table:
    heads = (
        "stages x stride", "reads", "steps in order",
        "latents", "predictions", "largest of a step", "identical",
    )  # fmt: skip
    figures = ("latents_error", "prediction_error", "prediction_error_largest")
    rows = tuple(
        (
            str(each.way.configuration),
            each.way.rule,
            steps_in_order_text(each),
            *(_small(each.summary()[name]) for name in figures),
            str(each.num_identical),
        )
        for each in result.ways
    )
    return Table(
        "Before decoding: relative L2 error",
        heads,
        rows,
        "latents: the final ones. predictions: what the noise scheduler is given at a step, with guidance, "
        "mean over steps and captions. identical: pictures without any difference after decoding.",
    )


def _judgements(result: QualityResult) -> Table:
    rows = [("in order", "", "", _digits(result.in_order.clip_score, 2), _digits(result.in_order.fid, 2))]
    rows += [
        (
            str(each.way.configuration),
            each.way.rule,
            steps_in_order_text(each),
            _digits(each.judgement.clip_score, 2),
            _digits(each.judgement.fid, 2),
        )
        for each in result.ways
    ]
    return Table(
        "Pictures by themselves",
        ("stages x stride", "reads", "steps in order", "CLIP score", "FID"),
        tuple(rows),
        "CLIP score: agreement of picture and caption, higher is better. FID: distance from real pictures, "
        "lower is better. Neither says how close a picture is to the one in order.",
    )


def write_csv(result: QualityResult, path: Path) -> None:
    """One row per way, and one for in order, which has no figures but CLIP score and FID."""
    summaries = [each.summary() for each in result.ways]
    heads = [*_WAY_HEADS, "speed_source", *summaries[0]]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, heads)
        writer.writeheader()
        judged = {"clip_score": result.in_order.clip_score, "fid": result.in_order.fid}
        writer.writerow({"configuration": "in order", "devices": 1, "speedup": 1.0, **judged})
        for each, summary in zip(result.ways, summaries, strict=True):
            writer.writerow(_csv_way(each) | summary)


def _csv_way(quality: WayQuality) -> dict[str, Any]:
    settings = quality.way.settings
    del settings["partition"]  # what became of it is the split
    return {
        "configuration": str(quality.way.configuration),
        **settings,
        "split": quality.split,
        "devices": quality.num_devices,
        "speed_source": "" if quality.speed is None else quality.speed.source,
    }


def steps_in_order_text(quality: WayQuality) -> str:
    """How many steps ran in order; of an automatic warm-up the least and the most of a batch."""
    counts = sorted({len(steps) for steps in quality.steps_in_order})
    text = "-".join(map(str, counts if len(counts) < 3 else (counts[0], counts[-1])))
    return text if isinstance(quality.way.warmup_steps, int) else f"auto ({text})"


def decibels(value: float) -> str:
    return "identical" if math.isinf(value) else f"{value:.1f} dB"


def _digits(value: float | None, digits: int, missing: str = "-") -> str:
    return missing if value is None else f"{value:.{digits}f}"


def _small(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"
