"""A tiny real pipeline of the stand-ins' parts, without text encoder."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn

from asyncdiff.tiny.parts import autoencoder, quiet
from asyncdiff.tiny.stable_diffusion import unet

NUM_STEPS = 5


def tiny_unet() -> UNet2DConditionModel:
    """Random weights from a fixed seed."""
    return unet(block_out_channels=(16, 16), cross_attention_dim=16, attention_head_dim=4)


def tiny_pipeline(
    denoiser: nn.Module | None = None, dtype: torch.dtype = torch.float32
) -> StableDiffusionPipeline:
    """A StableDiffusionPipeline without text encoder."""
    pipe = StableDiffusionPipeline(
        vae=autoencoder(), text_encoder=None, tokenizer=None, unet=denoiser or tiny_unet(),
        scheduler=DDIMScheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.unet.to(dtype)
    return quiet(pipe)


def generate(
    pipe: Any, *, seed: int = 3, num_steps: int = NUM_STEPS, size: int = 8, **kwargs: Any
) -> torch.Tensor:
    """Latents of one picture, with guidance, decided by `seed`."""
    random = torch.Generator().manual_seed(seed)
    prompt = torch.randn(1, 24, 16, generator=random).to(pipe.unet.dtype)
    negative = torch.randn(1, 24, 16, generator=random).to(pipe.unet.dtype)
    return pipe(
        prompt_embeds=prompt, negative_prompt_embeds=negative, num_inference_steps=num_steps, height=size,
        width=size, generator=random, output_type="latent", **kwargs,
    ).images  # fmt: skip
