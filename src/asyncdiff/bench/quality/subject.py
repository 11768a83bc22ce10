"""The pipeline whose pictures are compared, and its calls."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from asyncdiff.bench.loading import BUNDLED, load_pipeline
from asyncdiff.bench.quality.recording import recorded_steps
from asyncdiff.bench.quality.results import Generation
from asyncdiff.demo import DEMO_MODELS
from asyncdiff.errors import AsyncDiffError, ConfigurationError


@dataclass(frozen=True)
class BatchOutput:
    """Of one call. `predictions`: per step what the noise scheduler was given; `latents`: the final ones."""

    pictures: tuple[Image.Image, ...]
    predictions: tuple[torch.Tensor, ...]
    latents: torch.Tensor | None


class Subject:
    """A loaded pipeline with the noise scheduler that was asked for; the same call gives the same pictures
    every time. `ConfigurationError` for what cannot be called so."""

    def __init__(self, generation: Generation, device: str) -> None:
        self.pipe: Any = load_pipeline(generation.model, generation.dtype, device)
        if generation.scheduler is not None:
            self.pipe.scheduler = _scheduler(generation, self.pipe)
        self.device = torch.device(device)
        self.guidance_scale = generation.guidance_scale
        self._generation = generation
        self._arguments: dict[str, Any] = {"num_inference_steps": generation.steps}
        bundled = BUNDLED.get(generation.model)
        if bundled is not None:
            if self.guidance_scale is None:
                self.guidance_scale = DEMO_MODELS[bundled].guidance_scale
            self._arguments |= DEMO_MODELS[bundled].call_arguments
        if self.guidance_scale is not None:
            self._arguments["guidance_scale"] = self.guidance_scale
        self._check()

    @property
    def batches(self) -> list[tuple[str, ...]]:
        """The captions of each call."""
        captions, size = self._generation.captions, self._generation.batch_size
        return [captions[start : start + size] for start in range(0, len(captions), size)]

    @property
    def dtype(self) -> str:
        return str(self.pipe.dtype).removeprefix("torch.")

    def call(self, index: int) -> dict[str, Any]:
        """The arguments of one batch's call, with generators that nobody has used."""
        captions = self.batches[index]
        first = self._generation.seed + index * self._generation.batch_size
        return {
            **self._arguments,
            "prompt": list(captions),
            # Random numbers from the CPU are the same on every kind of device.
            "generator": [torch.Generator("cpu").manual_seed(first + i) for i in range(len(captions))],
        }

    def run(self, index: int) -> BatchOutput:
        """Generate one batch."""
        with recorded_steps(self.pipe.scheduler) as steps:
            pictures = getattr(self.pipe(**self.call(index)), "images", None)
        if not isinstance(pictures, Sequence) or not all(isinstance(each, Image.Image) for each in pictures):
            raise AsyncDiffError(f"{type(self.pipe).__name__} makes no pictures that could be compared.")
        return BatchOutput(tuple(pictures), tuple(steps.predictions), steps.latents)

    def _check(self) -> None:
        known = inspect.signature(self.pipe.__call__).parameters
        missing = [name for name in (*self._arguments, "prompt", "generator") if name not in known]
        if missing:
            raise ConfigurationError(
                f"{type(self.pipe).__name__} takes no {', '.join(missing)}: it cannot draw captions."
            )


def _scheduler(generation: Generation, pipe: Any) -> Any:
    import diffusers

    name = generation.scheduler or ""
    kind: Any = getattr(diffusers, name, None)
    is_scheduler = isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)
    if not is_scheduler:
        raise ConfigurationError(
            f"--scheduler {name}: is no noise scheduler of diffusers. Use a class name such as "
            "EulerDiscreteScheduler or DPMSolverMultistepScheduler."
        )
    return kind.from_config(pipe.scheduler.config, **dict(generation.scheduler_options))
