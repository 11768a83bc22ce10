"""Stable Diffusion 1.5 and its relatives."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from asyncdiff.tiny.stand_in import TinyCall, TinyPipeline

_TOKENS, _WIDTH = 5, 8


def _unet(**changes: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
        "cross_attention_dim": _WIDTH, "attention_head_dim": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    return UNet2DConditionModel(**(config | changes)).eval()


def _vae(**changes: Any) -> AutoencoderKL:
    torch.manual_seed(1)
    config: dict[str, Any] = {
        "block_out_channels": (4,), "norm_num_groups": 2, "latent_channels": 4,
        "down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",),
    }  # fmt: skip
    return AutoencoderKL(**(config | changes)).eval()


def _stable_diffusion() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline(
        vae=_vae(), text_encoder=None, tokenizer=None, unet=_unet(), scheduler=DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _arguments(call: TinyCall) -> dict[str, Any]:
    prompt, negative = call.randn(2, call.batch, _TOKENS, _WIDTH)
    side = 16 if call.large else 8
    return {
        "prompt_embeds": prompt, "negative_prompt_embeds": negative, "num_inference_steps": call.steps,
        "height": side, "width": side, "guidance_scale": 4.0, "generator": call.generator(),
        "output_type": "latent",
    }  # fmt: skip


FAMILIES = (TinyPipeline("sd15", _stable_diffusion, _arguments, denoisers=("unet",)),)
