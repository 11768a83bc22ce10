"""Other U-Nets."""

from __future__ import annotations

from typing import Any

import torch

from asyncdiff.bench.architectures.architecture import (
    Architecture,
    all_ones,
    image,
    randn,
    text,
    video,
)

_CASCADE_PRIOR: dict[str, Any] = {
    "conditioning_dim": 2048,
    "clip_text_in_channels": 1280,
    "clip_image_in_channels": 768,
    "switch_level": (False,),
}
_CASCADE_DECODER: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "patch_size": 2,
    "conditioning_dim": 1280,
    "block_out_channels": (320, 640, 1280, 1280),
    "num_attention_heads": (None, None, 20, 20),
    "down_num_layers_per_block": (2, 6, 28, 6),
    "up_num_layers_per_block": (6, 28, 6, 2),
    "dropout": (0, 0, 0.1, 0.1),
    "down_blocks_repeat_mappers": (1, 1, 1, 1),
    "up_blocks_repeat_mappers": (3, 3, 2, 2),
    "block_types_per_layer": (
        *(("SDCascadeResBlock", "SDCascadeTimestepBlock"),) * 2,
        *(("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),) * 2,
    ),
    "effnet_in_channels": 16,
    "pixel_mapper_in_channels": 3,
    "timestep_conditioning_type": ("sca",),
}


def _cascade_latents(height: int, width: int) -> tuple[int, ...]:
    """A latent for about 42.67 pixels each way."""
    return 16, -(-height * 3 // 128), -(-width * 3 // 128)


def _cascade_prior(latents: torch.Tensor) -> dict[str, Any]:
    return {
        "clip_text_pooled": randn(latents, 1, 1280),
        "clip_text": randn(latents, 77, 1280),
        "clip_img": randn(latents, 1, 768),
    }


def _cascade_decoder(latents: torch.Tensor) -> dict[str, Any]:
    return {"clip_text_pooled": randn(latents, 1, 1280), "effnet": randn(latents, 16, 24, 24)}


def _i2vgen(latents: torch.Tensor) -> dict[str, Any]:
    return text(77, 1024)(latents) | {
        "fps": torch.full((len(latents),), 16),
        "image_latents": randn(latents, *latents.shape[1:]),
        "image_embeddings": randn(latents, 1024),
    }


ARCHITECTURES = (
    Architecture(
        "kandinsky-3", "Kandinsky 3", "Kandinsky3UNet", image(4),
        text(128, 4096, encoder_attention_mask=all_ones(128)),
        component="unet", latents_name="sample", batch=2, noise_scheduler="DDPMScheduler",
    ),
    Architecture(
        "stable-cascade-prior", "Stable Cascade, prior", "StableCascadeUNet",
        _cascade_latents, _cascade_prior, _CASCADE_PRIOR,
        component="prior", latents_name="sample", timestep_name="timestep_ratio", batch=2,
    ),
    Architecture(
        "stable-cascade-decoder", "Stable Cascade, decoder", "StableCascadeUNet", image(4, 4),
        _cascade_decoder, _CASCADE_DECODER,
        component="decoder", latents_name="sample", timestep_name="timestep_ratio",
    ),
    Architecture(
        "i2vgen-xl", "I2VGen-XL, 16 frames", "I2VGenXLUNet", video(4, 16), _i2vgen, {"sample_size": 32},
        component="unet", latents_name="sample", batch=2, height=704, width=1280,
    ),
    Architecture(
        "text-to-video", "Text-to-video 1.7B, 16 frames", "UNet3DConditionModel", video(4, 16),
        text(77, 1024), {"sample_size": 32}, component="unet", latents_name="sample", batch=2,
        height=256, width=256, noise_scheduler="DDIMScheduler",
    ),
)  # fmt: skip
