"""How far pictures are from those in order, as values; what is computed from single pictures. No torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from asyncdiff.bench.configurations import Configuration
from asyncdiff.bench.quality.ways import Way
from asyncdiff.bench.runs.figures import Skipped

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Generation:
    """What is generated: caption i with a generator of its own, seeded with `seed + i`.

    `model`: "demo", "demo-transformer", a hub id or a folder. `guidance_scale`: None for the bundled models'
    own, or the pipeline's default. `scheduler`: a class of diffusers made from the configuration of the
    pipeline's own, with `scheduler_options`; None for the pipeline's own. `batch_size`: captions of a call.
    """

    model: str
    captions: tuple[str, ...]
    seed: int = 0
    steps: int = 50
    guidance_scale: float | None = None
    scheduler: str | None = None
    scheduler_options: tuple[tuple[str, Any], ...] = ()
    dtype: str = "auto"
    batch_size: int = 16

    @property
    def title(self) -> str:
        """One line for people."""
        parts = [self.model, f"{self.steps} steps"]
        if self.scheduler is not None:
            parts.append(self.scheduler)
        if self.guidance_scale is not None:
            parts.append(f"guidance {self.guidance_scale:g}")
        if self.dtype != "auto":
            parts.append(self.dtype)
        return ", ".join([*parts, f"{len(self.captions)} captions"])


@dataclass(frozen=True)
class Speed:
    """Seconds of the denoising of one batch (where measured, with the text encoder), in order and this way.

    `source`: "simulated" for devices like the one here, from the measured seconds of its blocks; "measured"
    on the devices that were named.
    """

    seconds: float
    seconds_in_order: float
    source: Literal["simulated", "measured"]

    @property
    def speedup(self) -> float:
        return self.seconds_in_order / self.seconds


@dataclass(frozen=True)
class Judgement:
    """Of pictures by themselves, not against those in order; None where it was not asked for.

    `clip_score`: 100 times the cosine of picture and caption, mean; higher is better. `fid`: Frechet distance
    to a folder of pictures; lower is better.
    """

    clip_score: float | None = None
    fid: float | None = None


@dataclass(frozen=True)
class WayQuality:
    """One way against in order. Per caption: `psnr_db` of the 8-bit pictures (infinite where they are equal),
    `ssim`, `ms_ssim` (None: too small), `lpips` (None: no weights), `latents_error` (relative L2 of the final
    latents; None where the pipeline steps no noise scheduler).

    `split`: the kind of partition (of several denoisers, the first one's). `prediction_errors`: per step,
    relative L2 of what the noise scheduler was given, mean over the captions. `steps_in_order`: of each
    batch, the steps that ran in order. `speed_missing`: why there is no `speed`.
    """

    way: Way
    num_devices: int
    split: str
    psnr_db: tuple[float, ...]
    ssim: tuple[float, ...]
    ms_ssim: tuple[float, ...] | None
    lpips: tuple[float, ...] | None
    latents_error: tuple[float, ...] | None
    prediction_errors: tuple[float, ...]
    steps_in_order: tuple[tuple[int, ...], ...]
    speed: Speed | None
    speed_missing: str = ""
    judgement: Judgement = Judgement()

    @property
    def num_identical(self) -> int:
        """Pictures without any difference."""
        return sum(map(math.isinf, self.psnr_db))

    @property
    def psnr_mean_db(self) -> float:
        """Of the pictures that differ; infinite where none does."""
        return mean_psnr_db(self.psnr_db)

    @property
    def psnr_worst_tenth_db(self) -> float:
        """Mean of the worst tenth of all pictures, at least one of them."""
        return mean_psnr_db(worst_tenth(self.psnr_db))

    @property
    def psnr_lowest_db(self) -> float:
        return min(self.psnr_db)

    @property
    def mean_steps_in_order(self) -> float:
        return statistics.fmean(map(len, self.steps_in_order))

    def summary(self) -> dict[str, float | int | None]:
        """The figures of a table's row; None for what there is not. An infinite PSNR stays infinite."""
        return {
            "psnr_mean_db": self.psnr_mean_db,
            "psnr_worst_tenth_db": self.psnr_worst_tenth_db,
            "psnr_lowest_db": self.psnr_lowest_db,
            "num_identical": self.num_identical,
            "ssim": _mean(self.ssim),
            "ms_ssim": _mean(self.ms_ssim),
            "lpips": _mean(self.lpips),
            "latents_error": _mean(self.latents_error),
            "prediction_error": _mean(self.prediction_errors or None),
            "prediction_error_largest": max(self.prediction_errors, default=None),
            "mean_steps_in_order": self.mean_steps_in_order,
            "speedup": None if self.speed is None else self.speed.speedup,
            "clip_score": self.judgement.clip_score,
            "fid": self.judgement.fid,
        }


@dataclass(frozen=True)
class QualityResult:
    """Everything that was found. `devices`: those it was measured on; one where all stages ran in turn.

    `guidance_scale`: as used, None for the pipeline's default. `picture_size`: width, height in pixels.
    `ms_ssim_scales`: of the usual five; 0 where the pictures are too small for one. `lpips_missing`: why
    there is no LPIPS. `grid`: some of the pictures.
    """

    generation: Generation
    pipeline: str
    scheduler: str
    guidance_scale: float | None
    dtype: str
    devices: tuple[str, ...]
    threads_per_device: int | None
    link: str
    picture_size: tuple[int, int]
    ms_ssim_scales: int
    lpips_missing: str
    in_order: Judgement
    ways: tuple[WayQuality, ...]
    skipped: tuple[Skipped, ...]
    environment: dict[str, Any]
    command: str
    grid: Image.Image

    @property
    def title(self) -> str:
        return self.generation.title

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, without the picture. null for an infinite PSNR: the pictures are equal."""
        values = {name: value for name, value in vars(self).items() if name != "grid"}
        values["generation"] = asdict(self.generation) | {
            "scheduler_options": dict(self.generation.scheduler_options)
        }
        values["in_order"] = asdict(self.in_order)
        values["ways"] = [way_json(each) for each in self.ways]
        values["skipped"] = [asdict(each) for each in self.skipped]
        plain: dict[str, Any] = _plain(values)
        return plain


def way_json(quality: WayQuality) -> dict[str, Any]:
    """One way's figures with their summary, as plain JSON values; null for an infinite PSNR."""
    values = asdict(quality) | {"way": {"name": str(quality.way), "rule": quality.way.rule}}
    values["way"] |= quality.way.settings
    values["summary"] = quality.summary()
    plain: dict[str, Any] = _plain(values)
    return plain


def way_from_json(values: dict[str, Any]) -> Way:
    """The way that `way_json` wrote."""
    way = values["way"]
    configuration = Configuration(way["num_stages"], way["stride"])
    return Way(
        configuration,
        way["forecast"],
        way["freshness"],
        way["warmup_steps"],
        way["partition"],
        way.get("guidance_refresh", 1),  # a file written before there was any has none
    )


def mean_psnr_db(values: Sequence[float]) -> float:
    """Mean of the finite ones; infinite where there is none. One picture without a difference would otherwise
    hide all others."""
    finite = [value for value in values if math.isfinite(value)]
    return statistics.fmean(finite) if finite else math.inf


def worst_tenth(values: Sequence[float]) -> list[float]:
    """The lowest tenth of them, rounded up."""
    return sorted(values)[: math.ceil(len(values) / 10)]


def _mean(values: Sequence[float] | None) -> float | None:
    return None if values is None else statistics.fmean(values)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
