"""Real denoiser architectures with random weights: what a measurement of speed needs, without a download.

The configurations are the published checkpoints' own (`unet/config.json`, `transformer/config.json`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from asyncdiff.demo import DEMO_MODEL
from asyncdiff.errors import ConfigurationError

if TYPE_CHECKING:
    import torch
    from torch import nn

_SD15_UNET: Mapping[str, Any] = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
_SD21_UNET: Mapping[str, Any] = {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
_SDXL_UNET: Mapping[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_SD3_TRANSFORMER: Mapping[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 192,
}


@dataclass(frozen=True)
class Architecture:
    """`conditions(batch, dtype)`: the denoiser inputs besides latents and timestep, for a batch with
    guidance. `latents_divisor`: pixels per latent.
    """

    name: str
    component: str
    class_name: str
    config: Mapping[str, Any]
    latent_channels: int
    conditions: Callable[[int, torch.dtype], dict[str, Any]]
    noise_scheduler: str = "DDIMScheduler"
    latents_divisor: int = 8


def _text(length: int, width: int) -> Callable[[int, torch.dtype], dict[str, Any]]:
    def conditions(batch: int, dtype: torch.dtype) -> dict[str, Any]:
        import torch

        return {"encoder_hidden_states": torch.randn(batch, length, width, dtype=dtype)}

    return conditions


def _sdxl_conditions(batch: int, dtype: torch.dtype) -> dict[str, Any]:
    import torch

    added = {
        "text_embeds": torch.randn(batch, 1280, dtype=dtype),
        "time_ids": torch.randn(batch, 6, dtype=dtype),
    }
    return {**_text(77, 2048)(batch, dtype), "added_cond_kwargs": added}


def _sd3_conditions(batch: int, dtype: torch.dtype) -> dict[str, Any]:
    import torch

    return {**_text(333, 4096)(batch, dtype), "pooled_projections": torch.randn(batch, 2048, dtype=dtype)}


ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        Architecture("sd15", "unet", "UNet2DConditionModel", _SD15_UNET, 4, _text(77, 768)),
        Architecture("sd21", "unet", "UNet2DConditionModel", _SD21_UNET, 4, _text(77, 1024)),
        Architecture("sdxl", "unet", "UNet2DConditionModel", _SDXL_UNET, 4, _sdxl_conditions),
        Architecture(
            "sd3",
            "transformer",
            "SD3Transformer2DModel",
            _SD3_TRANSFORMER,
            16,
            _sd3_conditions,
            "FlowMatchEulerDiscreteScheduler",
        ),
    )
}


def architecture_named(name: str) -> Architecture:
    """The architecture; `ConfigurationError` listing the known ones. `demo`: the bundled pipeline's U-Net."""
    if name == "demo":
        return _demo_architecture()
    if name not in ARCHITECTURES:
        known = ", ".join(["demo", *sorted(ARCHITECTURES)])
        raise ConfigurationError(f"--arch {name} is not known. Use one of {known}.")
    return ARCHITECTURES[name]


def _demo_architecture() -> Architecture:
    config = json.loads((DEMO_MODEL / "unet" / "config.json").read_text(encoding="utf-8"))
    picture = json.loads((DEMO_MODEL / "vae" / "config.json").read_text(encoding="utf-8"))["sample_size"]
    return Architecture(
        name="demo",
        component="unet",
        class_name="UNet2DConditionModel",
        config={key: value for key, value in config.items() if not key.startswith("_")},
        latent_channels=config["in_channels"],
        conditions=_text(16, config["cross_attention_dim"]),
        latents_divisor=picture // config["sample_size"],
    )


def build_denoiser(architecture: Architecture, dtype: torch.dtype, *, seed: int = 0) -> nn.Module:
    """The denoiser in evaluation mode, with random weights in `dtype`, on the CPU."""
    import diffusers
    import torch

    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        denoiser = getattr(diffusers, architecture.class_name)(**architecture.config)
    finally:
        torch.set_default_dtype(before)
    return denoiser.to(dtype).eval()


class DenoisingLoop:
    """The smallest thing that `parallelize` takes for a pipeline: a denoiser, a noise scheduler, and their
    loop.

    Guidance as one call with a batch of two, as Stable Diffusion pipelines make it.
    """

    def __init__(
        self, architecture: Architecture, denoiser: nn.Module, size: int, dtype: torch.dtype
    ) -> None:
        import diffusers
        import torch

        setattr(self, architecture.component, denoiser)
        self.denoiser = denoiser
        self.scheduler = getattr(diffusers, architecture.noise_scheduler)()
        generator = torch.Generator().manual_seed(0)
        side = size // architecture.latents_divisor
        self._latents = torch.randn(1, architecture.latent_channels, side, side, generator=generator).to(
            dtype
        )
        torch.manual_seed(0)
        self._conditions = architecture.conditions(2, dtype)

    @property
    def prediction_bytes(self) -> int:
        """Of one prediction, both guidance halves."""
        return 2 * self._latents.nbytes

    def __call__(self, num_steps: int, on_step_end: Callable[[int], None] | None = None) -> torch.Tensor:
        """Denoise in `num_steps` steps; the final latents."""
        import torch

        self.scheduler.set_timesteps(num_steps)
        latents = self._latents
        with torch.no_grad():
            for step, timestep in enumerate(self.scheduler.timesteps):
                doubled = torch.cat([latents] * 2)
                if hasattr(self.scheduler, "scale_model_input"):
                    doubled = self.scheduler.scale_model_input(doubled, timestep)
                prediction = self.denoiser(
                    doubled, timestep=timestep.expand(2), **self._conditions, return_dict=False
                )[0]
                unconditional, conditional = prediction.chunk(2)
                guided = unconditional + 5.0 * (conditional - unconditional)
                latents = self.scheduler.step(guided, timestep, latents, return_dict=False)[0]
                if on_step_end is not None:
                    on_step_end(step)
        return latents
