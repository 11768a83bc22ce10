"""Stable Diffusion and what was built on its U-Net: the pipelines of the mission."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from asyncdiff.bench.architectures.architecture import (
    Architecture,
    Conditions,
    LatentShape,
    image,
    randn,
    text,
    vector,
    video,
)

_SD15: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
_SD21: dict[str, Any] = {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
_UPSCALER: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 7,
    "block_out_channels": (256, 512, 512, 1024),
    "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
    "up_block_types": (*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
    "only_cross_attention": (True, True, True, False),
    "cross_attention_dim": 1024,
    "attention_head_dim": 8,
    "num_class_embeds": 1000,
    "use_linear_projection": True,
}
_SDXL: dict[str, Any] = {
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
_SD3: dict[str, Any] = {
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
_SD35_LARGE: dict[str, Any] = _SD3 | {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "qk_norm": "rms_norm",
}
_SVD: dict[str, Any] = {"sample_size": 96, "num_frames": 25}
# Stable Diffusion 1.5 with the motion adapter v1-5-2.
_ANIMATEDIFF: dict[str, Any] = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "num_attention_heads": 8,
    "motion_max_seq_length": 32,
    "use_motion_mid_block": False,
}

_FLOW = "FlowMatchEulerDiscreteScheduler"
_SD3_TEXT = text(333, 4096, pooled_projections=vector(2048))


def _sdxl_text(latents: torch.Tensor) -> dict[str, Any]:
    added = {"text_embeds": randn(latents, 1280), "time_ids": randn(latents, 6)}
    return {**text(77, 2048)(latents), "added_cond_kwargs": added}


def _noise_level(latents: torch.Tensor) -> torch.Tensor:
    return torch.full((len(latents),), 20)


def _residuals(channels: tuple[int, ...], layers: int = 2) -> Conditions:
    """What a ControlNet adds to the skip connections and to the middle, of a U-Net of these channels."""

    def conditions(latents: torch.Tensor) -> dict[str, Any]:
        height, width = latents.shape[-2:]
        skips = [randn(latents, channels[0], height, width)]
        for level, width_of_level in enumerate(channels):
            scale = 2**level
            skips += [randn(latents, width_of_level, height // scale, width // scale) for _ in range(layers)]
            if level + 1 < len(channels):
                skips.append(randn(latents, width_of_level, height // scale // 2, width // scale // 2))
        middle = torch.zeros_like(skips[-1])
        return {"down_block_additional_residuals": tuple(skips), "mid_block_additional_residual": middle}

    return conditions


def _sd15_controlnet(latents: torch.Tensor) -> dict[str, Any]:
    return text(77, 768)(latents) | _residuals((320, 640, 1280, 1280))(latents)


def _sdxl_controlnet(latents: torch.Tensor) -> dict[str, Any]:
    return _sdxl_text(latents) | _residuals((320, 640, 1280))(latents)


def _animatediff_text(latents: torch.Tensor) -> dict[str, Any]:
    """The text once for every frame."""
    samples, _, frames = latents.shape[:3]
    return {"encoder_hidden_states": torch.randn(samples * frames, 77, 768).to(latents.dtype)}


def _unet(
    name: str,
    title: str,
    latent_shape: LatentShape,
    conditions: Conditions,
    config: Mapping[str, Any],
    *,
    class_name: str = "UNet2DConditionModel",
    noise_scheduler: str | None = "DDIMScheduler",
    height: int = 1024,
    width: int = 1024,
    picture_channels: int = 0,
    channel_dim: int = 1,
    controlnet_class: str | None = None,
) -> Architecture:
    """A U-Net with guidance in one call."""
    return Architecture(
        name, title, class_name, latent_shape, conditions, config, height, width, batch=2,
        component="unet", noise_scheduler=noise_scheduler, latents_name="sample",
        picture_channels=picture_channels, channel_dim=channel_dim, controlnet_class=controlnet_class,
    )  # fmt: skip


ARCHITECTURES = (
    _unet("sd15", "Stable Diffusion 1.5", image(4), text(77, 768), _SD15, height=512, width=512),
    _unet("sd21", "Stable Diffusion 2.1", image(4), text(77, 1024), _SD21, height=768, width=768),
    # The autoencoder of the upscaler divides by four; its input is the picture to enlarge, 128 x 128.
    _unet(
        "x4-upscaler", "Stable Diffusion x4 upscaler", image(7, 4), text(77, 1024, class_labels=_noise_level),
        _UPSCALER, noise_scheduler=None, height=512, width=512,
    ),
    _unet("sdxl", "Stable Diffusion XL", image(4), _sdxl_text, _SDXL),
    _unet(
        "sdxl-inpainting", "Stable Diffusion XL inpainting", image(9), _sdxl_text, _SDXL | {"in_channels": 9},
        picture_channels=5,
    ),
    _unet(
        "controlnet-sd15", "Stable Diffusion 1.5 with ControlNet", image(4), _sd15_controlnet, _SD15,
        height=512, width=512, controlnet_class="ControlNetModel",
    ),
    _unet(
        "controlnet-sdxl", "Stable Diffusion XL with ControlNet", image(4), _sdxl_controlnet, _SDXL,
        controlnet_class="ControlNetModel",
    ),
    Architecture(
        "sd3", "Stable Diffusion 3 medium", "SD3Transformer2DModel", image(16), _SD3_TEXT, _SD3,
        batch=2, noise_scheduler=_FLOW,
    ),
    _unet(
        "svd", "Stable Video Diffusion, 25 frames", video(8, 25, frames_first=True),
        text(1, 1024, added_time_ids=vector(3)), _SVD,
        class_name="UNetSpatioTemporalConditionModel", height=576, width=1024,
        picture_channels=4, channel_dim=2,
    ),
    _unet(
        "animatediff", "AnimateDiff, 16 frames", video(4, 16), _animatediff_text, _ANIMATEDIFF,
        class_name="UNetMotionModel", height=512, width=512,
    ),
)  # fmt: skip
"""The mission's list."""

LATER = (
    Architecture(
        "sd35", "Stable Diffusion 3.5 large", "SD3Transformer2DModel", image(16), _SD3_TEXT,
        _SD35_LARGE, batch=2, noise_scheduler=_FLOW,
    ),
)  # fmt: skip
