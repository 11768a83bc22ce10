"""A real denoiser: its published configuration, and what it is called with at a usual size."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

Conditions = Callable[[torch.Tensor], dict[str, Any]]
"""From the latents to the denoiser's inputs beside latents and timestep."""

LatentShape = Callable[[int, int], tuple[int, ...]]
"""From the height and width of a picture in pixels to the shape of its latents, without the batch."""

Part = Callable[[torch.Tensor], Any]
"""From the latents to one of those inputs."""


@dataclass(frozen=True)
class Architecture:
    """`name`: that of the tiny stand-in in `asyncdiff.tiny`, where there is one. `config`: the checkpoint's
    own (`unet/config.json`, `transformer/config.json`), where it is not the class's default. `height`,
    `width`, `batch`: usual ones; a batch of two is guidance in one call. `noise_scheduler`: where one call a
    step, its output taken as it is, makes the loop (`asyncdiff bench step` runs these), else None. `prepare`:
    what is done to the denoiser so that values do not decide what it computes. `timestep_divisor`: what
    pipelines divide the noise scheduler's timestep by for this denoiser. `picture_channels`: how many of the
    latents' last channels, along `channel_dim`, are a picture that stays as it is beside the noise.
    `controlnet_class`: of the ControlNet whose results `conditions` has too, with the denoiser's
    configuration as far as it has the same; None where there is none.
    """

    name: str
    title: str
    class_name: str
    latent_shape: LatentShape
    conditions: Conditions
    config: Mapping[str, Any] = field(default_factory=dict)
    height: int = 1024
    width: int = 1024
    batch: int = 1
    component: str = "transformer"
    noise_scheduler: str | None = None
    latents_name: str = "hidden_states"
    timestep_name: str = "timestep"
    timestep_divisor: int = 1
    picture_channels: int = 0
    channel_dim: int = 1
    prepare: Callable[[nn.Module], None] | None = None
    controlnet_class: str | None = None

    def latents(self, height: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """One sample of noise, without the batch of guidance."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(1, *self.latent_shape(height, width), generator=generator).to(dtype)

    def inputs(self, dtype: torch.dtype) -> dict[str, Any]:
        """The denoiser's keyword arguments at the usual size."""
        latents = self.latents(self.height, self.width, dtype)
        latents = latents.expand(self.batch, *latents.shape[1:]).clone()
        moved = {self.latents_name: latents, self.timestep_name: torch.full((self.batch,), 500.0).to(dtype)}
        return moved | self.conditions(latents)


def build_denoiser(
    architecture: Architecture, dtype: torch.dtype, *, seed: int = 0, weightless: bool = False
) -> nn.Module:
    """The denoiser in evaluation mode, with random weights in `dtype`, on the CPU; or without any."""
    denoiser = _build(architecture.class_name, architecture.config, dtype, seed, weightless)
    if architecture.prepare is not None:
        architecture.prepare(denoiser)
    return nn.Module.to(denoiser, dtype).eval()  # diffusers' own warns of a conversion with nothing to lose


def build_controlnet(
    architecture: Architecture, dtype: torch.dtype, *, seed: int = 1, weightless: bool = False
) -> nn.Module | None:
    """The architecture's ControlNet, as `build_denoiser` builds; None where it has none."""
    if architecture.controlnet_class is None:
        return None
    import diffusers

    names = inspect.signature(getattr(diffusers, architecture.controlnet_class)).parameters
    config = {name: value for name, value in architecture.config.items() if name in names}
    controlnet = _build(architecture.controlnet_class, config, dtype, seed, weightless)
    return nn.Module.to(controlnet, dtype).eval()


def _build(
    class_name: str, config: Mapping[str, Any], dtype: torch.dtype, seed: int, weightless: bool
) -> nn.Module:
    import diffusers

    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    nowhere = init_empty_weights(include_buffers=True) if weightless else contextlib.nullcontext()
    try:
        with nowhere:
            module: nn.Module = getattr(diffusers, class_name)(**config)
    finally:
        torch.set_default_dtype(before)
    return module


def image(channels: int, pixels_per_latent: int = 8) -> LatentShape:
    """Latents of a picture, as an autoencoder makes them."""
    return lambda height, width: (channels, height // pixels_per_latent, width // pixels_per_latent)


def packed_image(channels: int) -> LatentShape:
    """Latents of a picture in patches of 16 x 16 pixels, one after the other."""
    return lambda height, width: ((height // 16) * (width // 16), channels)


def video(
    channels: int, frames: int, pixels_per_latent: int = 8, *, frames_first: bool = False
) -> LatentShape:
    """Latents of `frames` latent frames."""

    def shape(height: int, width: int) -> tuple[int, ...]:
        outer = (frames, channels) if frames_first else (channels, frames)
        return (*outer, height // pixels_per_latent, width // pixels_per_latent)

    return shape


def text(length: int, width: int, **more: Part) -> Conditions:
    """Text of so many tokens as `encoder_hidden_states`; `more`: further inputs by name."""

    def conditions(latents: torch.Tensor) -> dict[str, Any]:
        states = {"encoder_hidden_states": randn(latents, length, width)}
        return states | {name: make(latents) for name, make in more.items()}

    return conditions


def vector(*shape: int) -> Part:
    """Random numbers of this shape for every sample."""
    return lambda latents: randn(latents, *shape)


def all_ones(length: int, dtype: torch.dtype | None = None) -> Part:
    """A mask that leaves every token in; of the latents' dtype unless another is given."""
    return lambda latents: torch.ones(len(latents), length, dtype=dtype or latents.dtype)


def randn(latents: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.randn(len(latents), *shape).to(latents.dtype)
