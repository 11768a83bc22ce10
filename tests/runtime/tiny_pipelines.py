"""A tiny real pipeline."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn

NUM_STEPS = 5


def tiny_unet() -> UNet2DConditionModel:
    """Random weights from a fixed seed."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 16), layers_per_block=1, cross_attention_dim=16,
        norm_num_groups=4, attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip


def tiny_pipeline(
    unet: nn.Module | None = None, dtype: torch.dtype = torch.float32
) -> StableDiffusionPipeline:
    """A StableDiffusionPipeline without text encoder."""
    torch.manual_seed(1)
    vae = AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=None, tokenizer=None, unet=tiny_unet() if unet is None else unet,
        scheduler=DDIMScheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.to(dtype)
    return pipe


def generate(pipe: Any, *, seed: int = 3, num_steps: int = NUM_STEPS, **kwargs: Any) -> torch.Tensor:
    """Latents of one picture, with guidance, decided by `seed`."""
    random = torch.Generator().manual_seed(seed)
    prompt = torch.randn(1, 24, 16, generator=random).to(pipe.unet.dtype)
    negative = torch.randn(1, 24, 16, generator=random).to(pipe.unet.dtype)
    return pipe(
        prompt_embeds=prompt, negative_prompt_embeds=negative, num_inference_steps=num_steps, height=8,
        width=8, generator=random, output_type="latent", **kwargs,
    ).images  # fmt: skip
