"""The smallest thing that `parallelize` takes for a pipeline."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from asyncdiff.bench.architectures.architecture import Architecture

_PIXELS_PER_LATENT = 8  # of the ControlNet's own picture
_DOWN_RESIDUALS, _MIDDLE_RESIDUAL = "down_block_additional_residuals", "mid_block_additional_residual"


@dataclass(frozen=True)
class _Always:
    """A function of anything that can be pickled."""

    value: Any

    def __call__(self, *ignored: object) -> Any:
        return self.value


class DenoisingLoop:
    """A denoiser, a noise scheduler, and their loop.

    Guidance as one call with a batch of two, as Stable Diffusion pipelines make it, where the architecture's
    batch is two. With a `controlnet`, what that returns takes the place of the architecture's inputs of the
    same names.
    """

    def __init__(
        self,
        architecture: Architecture,
        denoiser: nn.Module,
        size: int,
        dtype: torch.dtype,
        controlnet: nn.Module | None = None,
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
        self.current_timestep: torch.Tensor | None = None
        if controlnet is not None:
            self.controlnet = controlnet
            height, width = (_PIXELS_PER_LATENT * length for length in self._latents.shape[-2:])
            self._control_picture = torch.rand(architecture.batch, 3, height, width).to(dtype)

    def to(self, device: str) -> DenoisingLoop:
        """Move everything there; itself."""
        nn.Module.to(self.denoiser, device)
        self._latents, self._conditions = send_to_device((self._latents, self._conditions), device)
        if hasattr(self, "controlnet"):
            nn.Module.to(self.controlnet, device)
            self._control_picture = self._control_picture.to(device)
        return self

    def own_architecture(self) -> Architecture:
        """The architecture with this loop's own inputs in the place of the functions that made them.

        It can be pickled: another process builds the same loop of it, at any size.
        """
        return replace(
            self._architecture,
            latent_shape=_Always(tuple(self._latents.shape[1:])),
            conditions=_Always(send_to_device(self._conditions, "cpu")),
        )

    @property
    def device(self) -> torch.device:
        return self._latents.device

    @property
    def dtype(self) -> torch.dtype:
        return self._latents.dtype

    def __call__(self, num_steps: int, on_step_end: Callable[[int], None] | None = None) -> torch.Tensor:
        """Denoise in `num_steps` steps; the final latents."""
        self.scheduler.set_timesteps(num_steps, device=self._latents.device)
        latents, picture = self._noise_and_picture()
        sigmas = self.scheduler.sigmas.tolist() if hasattr(self.scheduler, "sigmas") else None
        with torch.no_grad():
            for step, timestep in enumerate(self.scheduler.timesteps):
                self.current_timestep = timestep
                with self._cache_context(step, sigmas):
                    prediction = self._predict(latents, picture, timestep)
                latents = self.scheduler.step(prediction, timestep, latents, return_dict=False)[0]
                if on_step_end is not None:
                    on_step_end(step)
        self.current_timestep = None
        return latents

    def _cache_context(self, step: int, sigmas: list[float] | None) -> AbstractContextManager[None]:
        """What diffusers' pipelines call the denoisers in that can cache, under the names they use."""
        if not hasattr(self.denoiser, "cache_context"):
            return nullcontext()
        context: AbstractContextManager[None] = self.denoiser.cache_context(  # type: ignore[operator]
            "cond" if self._architecture.batch == 1 else "cond_uncond",
            step_index=step,
            num_inference_steps=len(self.scheduler.timesteps),
            sigma=None if sigmas is None else sigmas[step],
        )
        return context

    def _noise_and_picture(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What is denoised, and what is beside it in the denoiser's input: without channels where nothing
        is."""
        dim = self._architecture.channel_dim
        picture_channels = self._architecture.picture_channels
        sizes = [self._latents.shape[dim] - picture_channels, picture_channels]
        noise, picture = self._latents.split(sizes, dim)
        return noise, picture

    def _predict(self, latents: torch.Tensor, picture: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        batch = self._architecture.batch
        doubled = torch.cat([latents] * batch)
        if hasattr(self.scheduler, "scale_model_input"):
            doubled = self.scheduler.scale_model_input(doubled, timestep)
        if self._architecture.picture_channels:
            doubled = torch.cat([doubled, torch.cat([picture] * batch)], self._architecture.channel_dim)
        if self._architecture.timestep_divisor != 1:  # dividing by 1 would make a float of an integer
            timestep = timestep / self._architecture.timestep_divisor
        conditions = self._conditions
        if hasattr(self, "controlnet"):
            conditions = conditions | self._control(doubled, timestep.expand(batch))
        prediction = self.denoiser(doubled, timestep=timestep.expand(batch), **conditions, return_dict=False)[
            0
        ]
        if batch == 1:
            return prediction
        unconditional, conditional = prediction.chunk(2)
        return unconditional + 5.0 * (conditional - unconditional)

    def _control(self, doubled: torch.Tensor, timestep: torch.Tensor) -> dict[str, Any]:
        """The denoiser's inputs that the ControlNet makes."""
        skips, middle = _DOWN_RESIDUALS, _MIDDLE_RESIDUAL
        shared = {name: each for name, each in self._conditions.items() if name not in (skips, middle)}
        made = self.controlnet(
            doubled, timestep, controlnet_cond=self._control_picture, return_dict=False, **shared
        )
        return dict(zip((skips, middle), made, strict=True))
