"""Which noise schedulers work with which stride, and how far the pictures are from those in order; fills
docs/noise-schedulers.md.

python -m asyncdiff.bench.noise_schedulers support docs/noise-schedulers.md
python -m asyncdiff.bench.noise_schedulers quality docs/noise-schedulers.md --json quality.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image

from asyncdiff.bench.environment import describe_environment
from asyncdiff.bench.pictures import psnr_db
from asyncdiff.bench.readme import replace_measured
from asyncdiff.demo import DEMO_CAPTIONS, GUIDANCE_SCALE, load_demo_pipeline
from asyncdiff.errors import ConfigurationError
from asyncdiff.pipeline import parallelize
from asyncdiff.pipeline.timesteps import input_scale
from asyncdiff.pipeline.user_warning import AsyncDiffWarning
from asyncdiff.tiny import TinyCall, generate
from asyncdiff.tiny.noise_schedulers import SCHEDULER_CASES, SchedulerCase

STRIDES = (1, 2)
STEPS = 6
_IN_ORDER = 99

QUALITY_SCHEDULERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("DDIMScheduler", {}),
    ("PNDMScheduler", {"skip_prk_steps": True}),
    ("EulerDiscreteScheduler", {}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ("UniPCMultistepScheduler", {}),
    ("HeunDiscreteScheduler", {}),
    ("KDPM2DiscreteScheduler", {}),
)
QUALITY_STEPS = (50, 25)


@dataclass(frozen=True)
class Support:
    """What was found of one case. `calls`: of the denoiser in a run of `STEPS` steps; `scales`: the smallest
    and the largest factor on the denoiser's input; `by_stride`: "yes", or the refusal."""

    case: SchedulerCase
    calls: int
    scales: tuple[float, float]
    by_stride: tuple[str, ...]


def find_support(case: SchedulerCase, strides: Sequence[int] = STRIDES) -> Support:
    """Run the case's stand-in alone, in order and asynchronously, with every stride.

    `RuntimeError` where the latents in order are not bitwise those of the untouched pipeline, or where the
    asynchronous ones are the same or not finite.
    """
    pipe = case.build()
    alone = _latents(case, pipe)
    calls = len(pipe.scheduler.timesteps)
    scales = [scale for index in range(calls) if (scale := input_scale(pipe.scheduler, index)) is not None]
    found = []
    for stride in strides:
        with parallelize(pipe, num_stages=2, stride=stride, warmup_steps=_IN_ORDER) as handle:
            try:
                in_order = _latents(case, pipe)
                handle.set(warmup_steps=1)
                stale = _latents(case, pipe)
            except ConfigurationError as refusal:
                found.append(f"refused: {refusal}")
                continue
        if not torch.equal(in_order, alone) or torch.equal(stale, alone) or not stale.isfinite().all():
            raise RuntimeError(f"{case.name} with stride={stride} is not what docs/method.md says.")
        found.append("yes")
    return Support(case, calls, (min(scales), max(scales)), tuple(found))


def _latents(case: SchedulerCase, pipe: Any) -> torch.Tensor:
    torch.manual_seed(0)  # for noise schedulers that ignore the generator
    return generate(case.stand_in, pipe, TinyCall(steps=STEPS), **case.arguments)


def support_table(found: Iterable[Support]) -> str:
    """In Markdown, one row for each noise scheduler and stand-in; the cases of a row were all found alike."""
    rows = [
        "| noise scheduler | with | tried with | calls "
        f"| input scaled by | {' | '.join(f'stride {stride}' for stride in STRIDES)} |",
        "|" + "---|" * (5 + len(STRIDES)),
    ]
    for (scheduler, family), group in itertools.groupby(found, _row_key):
        cases = list(group)
        low, high = min(each.scales[0] for each in cases), max(each.scales[1] for each in cases)
        cells = [
            f"`{scheduler}`",
            family,
            "; ".join(each.case.variant or "defaults" for each in cases),
            _range(each.calls for each in cases),
            "" if low == high == 1.0 else f"{low:.3g} to {high:.3g}",
            *(
                "; ".join(dict.fromkeys(answers))
                for answers in zip(*(e.by_stride for e in cases), strict=True)
            ),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _row_key(found: Support) -> tuple[str, str]:
    return found.case.scheduler, found.case.family


def _range(values: Iterable[int]) -> str:
    return " or ".join(str(value) for value in sorted(set(values)))


@dataclass(frozen=True)
class Quality:
    """PSNR of the bundled pipeline's pictures against those in order; `evaluations`: denoiser calls."""

    scheduler: str
    options: dict[str, Any]
    steps: int
    evaluations: int
    num_stages: int
    stride: int
    psnr_db: float
    psnr_lowest_db: float


def measure_quality(
    scheduler: str,
    options: dict[str, Any],
    steps: int,
    *,
    strides: Sequence[int] = STRIDES,
    num_stages: int = 2,
) -> list[Quality]:
    """All demo captions with defaults of everything else, one after the other on this machine's CPU."""
    pipe = load_demo_pipeline()
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, **options)
    reference = _pictures(pipe, steps)
    evaluations = len(pipe.scheduler.timesteps)
    found = []
    for stride in strides:
        with parallelize(pipe, num_stages=num_stages, stride=stride, partition="chain"):
            pictures = _pictures(pipe, steps)
        psnrs = [psnr_db(*pair) for pair in zip(reference, pictures, strict=True)]
        found.append(
            Quality(
                scheduler,
                options,
                steps,
                evaluations,
                num_stages,
                stride,
                statistics.mean(psnrs),
                min(psnrs),
            )
        )
    return found


def _pictures(pipe: Any, steps: int) -> list[Image.Image]:
    pictures: list[Image.Image] = pipe(
        list(DEMO_CAPTIONS),
        num_inference_steps=steps,
        guidance_scale=GUIDANCE_SCALE,
        generator=[torch.Generator().manual_seed(index) for index in range(len(DEMO_CAPTIONS))],
    ).images
    return pictures


def quality_table(measured: dict[str, Any]) -> str:
    """In Markdown, from what the command `quality` wrote; the worst picture in parentheses."""
    results = [Quality(**result) for result in measured["results"]]
    columns = [(steps, stride) for steps in QUALITY_STEPS for stride in STRIDES]
    rows = [
        "| noise scheduler | "
        + " | ".join(f"{steps} steps, stride {stride}" for steps, stride in columns)
        + " |",
        "|" + "---|" * (1 + len(columns)),
    ]
    for _, group in itertools.groupby(results, lambda result: (result.scheduler, str(result.options))):
        cells = {(result.steps, result.stride): result for result in group}
        first = next(iter(cells.values()))
        options = "".join(f" `{name}={value}`" for name, value in first.options.items())
        shown = [f"{cells[c].psnr_db:.1f} ({cells[c].psnr_lowest_db:.1f})" for c in columns]
        rows.append(f"| `{first.scheduler}`{options} | {' | '.join(shown)} |")
    versions = measured["environment"]["packages"]
    note = (
        f"dB, mean of {len(DEMO_CAPTIONS)} captions (worst one in parentheses); {results[0].num_stages} "
        f"stages, one warm-up step, defaults otherwise. torch {versions['torch']}, diffusers "
        f"{versions['diffusers']}. Made by `{measured['command']}`."
    )
    return "\n".join([*rows, "", note])


def main() -> None:
    """The commands of the module's docstring."""
    parser = argparse.ArgumentParser(description="Fill the tables of docs/noise-schedulers.md.")
    parser.add_argument("what", choices=["support", "quality"])
    parser.add_argument("page", type=Path)
    parser.add_argument("--json", type=Path, help="where the figures of `quality` go")
    given = parser.parse_args()
    warnings.simplefilter("ignore", AsyncDiffWarning)
    torch.set_num_threads(1)
    table = _support() if given.what == "support" else _quality(given.json)
    given.page.write_text(replace_measured(given.page.read_text(), table, given.what))


def _support() -> str:
    return support_table(find_support(case) for case in SCHEDULER_CASES)


def _quality(path: Path | None) -> str:
    results: list[Quality] = []
    for scheduler, options in QUALITY_SCHEDULERS:
        for steps in QUALITY_STEPS:
            results += measure_quality(scheduler, options, steps)
    measured = {
        "results": [asdict(result) for result in results],
        "environment": describe_environment(),
        "command": " ".join(["python -m asyncdiff.bench.noise_schedulers", *sys.argv[1:]]),
    }
    if path is not None:
        path.write_text(json.dumps(measured, indent=2) + "\n")
    return quality_table(measured)


if __name__ == "__main__":
    main()
