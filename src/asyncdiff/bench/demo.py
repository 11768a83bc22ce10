"""The demo: held-out captions in order on one device, then on several, and how far the pictures are apart."""

from __future__ import annotations

import statistics
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from asyncdiff.bench.environment import describe_environment
from asyncdiff.bench.pictures import psnr_db, side_by_side
from asyncdiff.bench.progress import Progress, no_progress
from asyncdiff.bench.step_clock import StepClock
from asyncdiff.bench.threads import intra_op_threads
from asyncdiff.demo import DEMO_CAPTIONS, DEMO_MODELS, DemoModel, load_demo_pipeline
from asyncdiff.pipeline import RunReport, parallelize, plan
from asyncdiff.runtime.allocator import freed_memory_kept
from asyncdiff.weights import resident_bytes

_UNTIMED_STEPS = 6
_AMPLIFICATION = 8.0
# A step is short here, so an exchange counts, and a chain exchanges least often.
_PARTITION = "chain"


@dataclass(frozen=True)
class DemoResult:
    """`seconds_in_order`, `seconds`: of the denoising (median over the runs). `speedup`: the median over
    the pairs of runs, one in order and one on several devices right after it. `psnr_db`: mean over the
    pictures, which are compared as 8-bit pictures; `psnr_lowest_db`: of the worst one.
    """

    model: str
    devices: tuple[str, ...]
    num_stages: int
    stride: int
    warmup_steps: int | str
    forecast: str
    freshness: str
    steps: int
    seed: int
    runs: int
    seconds_in_order: float
    seconds: float
    speedup: float
    speedup_per_run: tuple[float, ...]
    seconds_in_order_per_run: tuple[float, ...]
    seconds_per_run: tuple[float, ...]
    psnr_db: float
    psnr_lowest_db: float
    bytes_per_step: int
    weight_share: tuple[float, ...]
    environment: dict[str, Any]
    command: str
    picture: Image.Image
    report: RunReport

    def write_trace(self, path: Path) -> None:
        """Write the last run on several devices for ui.perfetto.dev."""
        self.report.write_trace(path)

    def to_json(self) -> dict[str, Any]:
        """The figures as plain JSON values, without the picture and the trace."""
        values = {key: value for key, value in vars(self).items() if key not in ("picture", "report")}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    def rows(self) -> list[tuple[str, str, str]]:
        """(what, value, note) for a table."""
        count = len(self.devices)
        return [
            ("in order, 1 device", f"{self.seconds_in_order:.2f} s", _runs(self.seconds_in_order_per_run)),
            (f"asyncdiff, {count} devices", f"{self.seconds:.2f} s", _runs(self.seconds_per_run)),
            (
                "speed-up of the denoising",
                f"{self.speedup:.2f}x",
                f"median of {len(self.speedup_per_run)} pairs of runs: "
                f"{min(self.speedup_per_run):.2f}x to {max(self.speedup_per_run):.2f}x; "
                f"{self.steps} steps, {len(DEMO_CAPTIONS)} pictures",
            ),
            (
                "PSNR against in order",
                f"{self.psnr_db:.1f} dB",
                f"the worst picture {self.psnr_lowest_db:.1f} dB",
            ),
            (
                "sent per step",
                f"{self.bytes_per_step / 1e6:.2f} MB",
                "between the devices, in the steady state",
            ),
            (
                "weights per device",
                " / ".join(f"{100 * share:.0f}" for share in self.weight_share) + " %",
                "of the denoiser's",
            ),
        ]


def run_demo(
    devices: Sequence[str],
    *,
    model: str = "unet",
    num_stages: int,
    stride: int = 1,
    warmup_steps: int | str = 1,
    tolerance: float | None = None,
    time_shift: bool = False,
    forecast: str = "latents",
    freshness: str = "auto",
    steps: int = 50,
    seed: int = 0,
    runs: int = 5,
    progress: Progress = no_progress,
) -> DemoResult:
    """Generate the demo captions in order on the first device and then on all of them, `runs` times.

    `model` is one of `asyncdiff.demo.DEMO_MODELS`.

    A CPU device is one core, in order as well as on several. The two take turns, because a machine's speed
    drifts from one minute to the next; both are timed after an untimed call.
    """
    bundled = DEMO_MODELS[model]
    original, pipe = (_load(bundled, devices[0]) for _ in range(2))
    with intra_op_threads(1), freed_memory_kept():  # as in workers
        progress("Timing the blocks", 0, 0)
        split: dict[str, Any] = {
            "num_stages": num_stages,
            "stride": stride,
            "warmup_steps": warmup_steps,
            "tolerance": tolerance,
            "time_shift": time_shift,
            "forecast": forecast,
            "freshness": freshness,
        }
        example = {
            "prompt": list(DEMO_CAPTIONS),
            "guidance_scale": bundled.guidance_scale,
            **bundled.call_arguments,
        }
        chosen = plan(pipe, list(devices), partition=_PARTITION, profile=True, example=example, **split)
        whole_bytes = resident_bytes(getattr(pipe, bundled.name))
        progress("Starting the workers", 0, 0)
        in_order, parallel = [], []
        with parallelize(pipe, list(devices), plan=chosen) as handle:
            for each in (original, pipe):
                _generate(each, example, _UNTIMED_STEPS, seed, "Untimed run", no_progress)
            for run in range(runs):
                where = f"run {run + 1} of {runs}"
                in_order.append(
                    _generate(original, example, steps, seed, f"In order on 1 device, {where}", progress)
                )
                parallel.append(
                    _generate(pipe, example, steps, seed, f"On {len(devices)} devices, {where}", progress)
                )
            report = handle.last_run
    reference, pictures = in_order[-1][0], parallel[-1][0]
    psnrs = [psnr_db(*pair) for pair in zip(reference, pictures, strict=True)]
    before = [seconds for _, seconds in in_order]
    after = [seconds for _, seconds in parallel]
    speedups = [one / several for one, several in zip(before, after, strict=True)]
    return DemoResult(
        model=model,
        devices=tuple(devices),
        num_stages=num_stages,
        stride=stride,
        warmup_steps=warmup_steps,
        forecast=forecast,
        freshness=freshness,
        steps=steps,
        seed=seed,
        runs=runs,
        seconds_in_order=statistics.median(before),
        seconds=statistics.median(after),
        speedup=statistics.median(speedups),
        speedup_per_run=tuple(speedups),
        seconds_in_order_per_run=tuple(before),
        seconds_per_run=tuple(after),
        psnr_db=float(np.mean(psnrs)),
        psnr_lowest_db=min(psnrs),
        bytes_per_step=report.steps[-2].bytes_sent,
        weight_share=tuple(held / whole_bytes for held in report.weight_bytes),
        environment=describe_environment(),
        command=" ".join(["asyncdiff", *sys.argv[1:]]),
        picture=side_by_side(
            list(zip(reference, pictures, strict=True)),
            list(DEMO_CAPTIONS),
            amplification=_AMPLIFICATION,
            columns=("1 device", f"{len(devices)} devices"),
            across=2,
        ),
        report=report,
    )


def _load(model: DemoModel, device: str) -> Any:
    pipe = load_demo_pipeline(model=model.name).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _generate(
    pipe: Any, example: dict[str, Any], steps: int, seed: int, what: str, progress: Progress
) -> tuple[list[Image.Image], float]:
    """The demo's pictures, and the seconds of their denoising."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="A run of")
        clock = StepClock(what, progress=progress)
        pictures = pipe(
            **example,
            num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(seed + index) for index in range(len(DEMO_CAPTIONS))],
            callback_on_step_end=clock,
        ).images
    return pictures, clock.denoise_seconds


def _runs(values: Sequence[float]) -> str:
    return f"median of {len(values)}: {min(values):.2f} to {max(values):.2f} s"
