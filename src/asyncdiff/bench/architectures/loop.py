"""The smallest thing that `parallelize` takes for a pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from asyncdiff.bench.architectures.architecture import Architecture


class DenoisingLoop:
    """A denoiser, a noise scheduler, and their loop.

    Guidance as one call with a batch of two, as Stable Diffusion pipelines make it, where the architecture's
    batch is two.
    """

    def __init__(
        self, architecture: Architecture, denoiser: nn.Module, size: int, dtype: torch.dtype
    ) -> None:
        import diffusers

        assert architecture.noise_scheduler is not None
        setattr(self, architecture.component, denoiser)
        self.denoiser = denoiser
        self.scheduler: Any = getattr(diffusers, architecture.noise_scheduler)()
        self._architecture = architecture
        self._latents = architecture.latents(size, size, dtype)
        torch.manual_seed(0)
        self._conditions = architecture.conditions(torch.cat([self._latents] * architecture.batch))

    @property
    def prediction_bytes(self) -> int:
        """Of one prediction, all guidance halves."""
        return self._architecture.batch * self._latents.nbytes

    def __call__(self, num_steps: int, on_step_end: Callable[[int], None] | None = None) -> torch.Tensor:
        """Denoise in `num_steps` steps; the final latents."""
        self.scheduler.set_timesteps(num_steps)
        latents = self._latents
        with torch.no_grad():
            for step, timestep in enumerate(self.scheduler.timesteps):
                latents = self.scheduler.step(
                    self._predict(latents, timestep), timestep, latents, return_dict=False
                )[0]
                if on_step_end is not None:
                    on_step_end(step)
        return latents

    def _predict(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        batch = self._architecture.batch
        doubled = torch.cat([latents] * batch)
        if hasattr(self.scheduler, "scale_model_input"):
            doubled = self.scheduler.scale_model_input(doubled, timestep)
        prediction = self.denoiser(
            doubled, timestep=timestep.expand(batch), **self._conditions, return_dict=False
        )[0]
        if batch == 1:
            return prediction
        unconditional, conditional = prediction.chunk(2)
        return unconditional + 5.0 * (conditional - unconditional)
