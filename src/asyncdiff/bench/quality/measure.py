"""Measuring: every way against the same pictures in order, which are made once."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from PIL import Image

from asyncdiff.bench.environment import describe_environment, installed_version
from asyncdiff.bench.pictures import against_reference, psnr_db
from asyncdiff.bench.progress import Progress, no_progress
from asyncdiff.bench.quality.metrics import Judges, Lpips, ms_ssim, ms_ssim_scales, ssim
from asyncdiff.bench.quality.recording import relative_errors
from asyncdiff.bench.quality.results import Generation, Judgement, QualityResult, Speed, WayQuality
from asyncdiff.bench.quality.speed import LINK, SimulatedSpeeds, denoise_seconds
from asyncdiff.bench.quality.subject import BatchOutput, Subject
from asyncdiff.bench.quality.ways import Way
from asyncdiff.bench.quality.weights import LocalWeights
from asyncdiff.bench.runs.figures import Skipped
from asyncdiff.bench.threads import intra_op_threads
from asyncdiff.errors import ConfigurationError
from asyncdiff.pipeline import Handle, parallelize, plan
from asyncdiff.pipeline.devices import Placement
from asyncdiff.runtime.allocator import freed_memory_kept

AMPLIFICATION = 8.0
_SHOWN = 4  # captions on the picture


def measure_quality(
    generation: Generation,
    ways: Sequence[Way],
    devices: Sequence[str] = ("cpu",),
    *,
    simulated: bool = True,
    weights: LocalWeights | None = None,
    progress: Progress = no_progress,
) -> QualityResult:
    """Generate in order and in every way, and compare.

    `simulated`: all stages run in turn on the first of the devices, which gives the pictures of several like
    it, and speed is simulated. Otherwise each way takes as many devices as it needs and is timed; CPU devices
    share the cores evenly, in order on one share. A way that the model refuses is left out with the reason;
    `ConfigurationError` if all are.
    """
    weights = weights or LocalWeights()
    weights.check(len(generation.captions))
    names = tuple(devices[:1] if simulated else devices)
    threads = Placement("spawn", names, len(names)).threads_per_device
    with intra_op_threads(threads), freed_memory_kept():  # as in workers
        return _Measurement(generation, names, simulated, weights, progress).run(ways)


class _Measurement:
    def __init__(
        self,
        generation: Generation,
        devices: tuple[str, ...],
        simulated: bool,
        weights: LocalWeights,
        progress: Progress,
    ) -> None:
        progress(f"Loading {generation.model}", 0, 0)
        self.generation = generation
        self.devices = devices
        self.simulated = simulated
        self.progress = progress
        self.subject = Subject(generation, devices[0])
        self.lpips = None if weights.lpips is None else Lpips(weights.lpips)
        self.lpips_missing = weights.lpips_missing
        self.judges = Judges(weights)
        self.threads = torch.get_num_threads() if self.subject.device.type == "cpu" else None

    def run(self, ways: Sequence[Way]) -> QualityResult:
        self.reference, in_order = self._run_all("In order")
        self.seconds_in_order = 0.0 if self.simulated else self._denoise_seconds()
        self.num_steps = len(self.reference[0].predictions) or self.generation.steps
        self.speeds = SimulatedSpeeds(self.subject.pipe, self.subject.call(0), self.num_steps)
        size = self.reference[0].pictures[0].size
        self.scales = ms_ssim_scales(*size)
        found: list[WayQuality] = []
        skipped: list[Skipped] = []
        pictures = [picture for output in self.reference for picture in output.pictures]
        shown = [("in order", pictures[:_SHOWN])]
        for way in ways:
            try:
                quality, pictures = self._measure(way)
            except ConfigurationError as error:
                skipped.append(Skipped(str(way), str(error)))
            else:
                found.append(quality)
                shown.append((str(way), pictures))
        if not found:
            reasons = " ".join(f"{each.name}: {each.reason}" for each in skipped)
            raise ConfigurationError(f"This model refuses every configuration. {reasons}")
        environment = describe_environment()
        environment["packages"]["torchmetrics"] = installed_version("torchmetrics")
        return QualityResult(
            generation=self.generation,
            pipeline=type(self.subject.pipe).__name__,
            scheduler=type(self.subject.pipe.scheduler).__name__,
            guidance_scale=self.subject.guidance_scale,
            dtype=self.subject.dtype,
            devices=self.devices,
            threads_per_device=self.threads,
            link=LINK if self.simulated else "",
            picture_size=size,
            ms_ssim_scales=self.scales,
            lpips_missing=self.lpips_missing,
            in_order=in_order,
            ways=tuple(found),
            skipped=tuple(skipped),
            environment=environment,
            command=" ".join(["asyncdiff", *sys.argv[1:]]),
            grid=against_reference(shown, self.generation.captions[:_SHOWN], amplification=AMPLIFICATION),
        )

    def _run_all(self, title: str) -> tuple[list[BatchOutput], Judgement]:
        outputs = []
        for index, captions in enumerate(self.subject.batches):
            self.progress(title, index, len(self.subject.batches))
            outputs.append(self.subject.run(index))
            self.judges.see(outputs[-1].pictures, captions)
        return outputs, self.judges.judge()

    def _measure(self, way: Way) -> tuple[WayQuality, list[Image.Image]]:
        """With the pictures of the first captions."""
        compared = _Compared()
        pictures: list[Image.Image] = []
        steps_in_order = []
        with self._divided(way) as handle:
            for index, captions in enumerate(self.subject.batches):
                self.progress(str(way), index, len(self.subject.batches))
                output = self.subject.run(index)
                compared.add(output, self.reference[index], self.scales, self.lpips)
                self.judges.see(output.pictures, captions)
                steps_in_order.append(handle.last_run.steps_in_order)
                pictures += output.pictures[: _SHOWN - len(pictures)]
            plans = handle.plans
            chosen = next(iter(plans.values()))
            assert chosen is not None  # it has run
            seconds = 0.0 if self.simulated else self._denoise_seconds()
        judgement = self.judges.judge()
        speed: Speed | None = None
        why_not = ""
        if not self.simulated:
            speed = Speed(seconds, self.seconds_in_order, "measured")
        elif len(plans) > 1:
            why_not = f"not simulated for several denoisers ({', '.join(plans)})"
        else:
            speed = self.speeds.speed(chosen, [len(steps) for steps in steps_in_order])
        quality = WayQuality(
            way=way,
            num_devices=way.configuration.num_devices,
            split=chosen.kind,
            psnr_db=tuple(compared.psnr_db),
            ssim=tuple(compared.ssim),
            ms_ssim=tuple(compared.ms_ssim) or None,
            lpips=tuple(compared.lpips) or None,
            latents_error=tuple(compared.latents_error) or None,
            prediction_errors=compared.prediction_errors(),
            steps_in_order=tuple(steps_in_order),
            speed=speed,
            speed_missing=why_not,
            judgement=judgement,
        )
        return quality, pictures

    @contextmanager
    def _divided(self, way: Way) -> Iterator[Handle]:
        pipe = self.subject.pipe
        if self.simulated:
            with parallelize(pipe, **way.settings) as handle:
                yield handle
            return
        names = list(self.devices[: way.configuration.num_devices])
        chosen = plan(pipe, names, **way.settings, example=self.subject.call(0))
        # Fewer devices than there are would share the cores among fewer, which in order does not get either.
        with parallelize(pipe, names, plan=replace(chosen, threads_per_device=self.threads)) as handle:
            yield handle

    def _denoise_seconds(self) -> float:
        return denoise_seconds(self.subject.pipe, self.subject.call(0), self.subject.device)


@dataclass
class _Compared:
    """Per picture; `by_step`: per step, of every picture."""

    psnr_db: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    ms_ssim: list[float] = field(default_factory=list)
    lpips: list[float] = field(default_factory=list)
    latents_error: list[float] = field(default_factory=list)
    by_step: list[list[float]] = field(default_factory=list)

    def add(self, found: BatchOutput, expected: BatchOutput, scales: int, lpips: Lpips | None) -> None:
        pictures, reference = found.pictures, expected.pictures
        self.psnr_db += map(psnr_db, reference, pictures)
        self.ssim += ssim(pictures, reference)
        if scales:
            self.ms_ssim += ms_ssim(pictures, reference, scales)
        if lpips is not None:
            self.lpips += lpips(pictures, reference)
        if found.latents is not None and expected.latents is not None:
            self.latents_error += relative_errors(found.latents, expected.latents)
        self.by_step = self.by_step or [[] for _ in expected.predictions]
        for errors, *pair in zip(self.by_step, found.predictions, expected.predictions, strict=True):
            errors += relative_errors(*pair)

    def prediction_errors(self) -> tuple[float, ...]:
        return tuple(statistics.fmean(errors) for errors in self.by_step)
