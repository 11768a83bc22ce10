"""Pipelines of the stand-ins' parts without text encoders, and one way to call all of them.

Prompts are given as embeddings, so that nothing but the denoiser computes; pictures are latents unless a test
asks for more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

from asyncdiff.tiny.parts import autoencoder, quiet, random_weights
from asyncdiff.tiny.stable_diffusion import unet
from asyncdiff.tiny.text import CLIP_WIDTH

TOKENS, WIDTH = 5, CLIP_WIDTH


def sd(pipeline: type = StableDiffusionPipeline, **components: Any) -> Any:
    """A Stable Diffusion pipeline (or a relative of it) without text encoder."""
    parts: dict[str, Any] = {
        "unet": None, "vae": None, "scheduler": None, "text_encoder": None, "tokenizer": None,
        "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False,
    } | components  # fmt: skip
    parts["unet"] = parts["unet"] or unet()
    parts["vae"] = parts["vae"] or autoencoder()
    parts["scheduler"] = parts["scheduler"] or DDIMScheduler()
    return quiet(pipeline(**parts))


def sdxl(**components: Any) -> StableDiffusionXLPipeline:
    time_ids, embedding = 6 * 4, 8
    parts: dict[str, Any] = {
        "unet": None, "vae": None, "scheduler": None, "text_encoder": None, "text_encoder_2": None,
        "tokenizer": None, "tokenizer_2": None, "add_watermarker": False,
    } | components  # fmt: skip
    parts["unet"] = parts["unet"] or unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=time_ids + embedding,
    )
    parts["vae"] = parts["vae"] or autoencoder()
    parts["scheduler"] = parts["scheduler"] or DDIMScheduler()
    return quiet(StableDiffusionXLPipeline(**parts))


def _sd3_transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=4, attention_head_dim=4, num_attention_heads=2,
        caption_projection_dim=8, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, out_channels=4,
        pos_embed_max_size=16,
    )  # fmt: skip


def sd3(**components: Any) -> StableDiffusion3Pipeline:
    parts: dict[str, Any] = {
        "transformer": None, "vae": None, "scheduler": None, "text_encoder": None, "text_encoder_2": None,
        "text_encoder_3": None, "tokenizer": None, "tokenizer_2": None, "tokenizer_3": None,
    } | components  # fmt: skip
    parts["transformer"] = parts["transformer"] or random_weights(_sd3_transformer)
    parts["vae"] = parts["vae"] or autoencoder(
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06
    )
    parts["scheduler"] = parts["scheduler"] or FlowMatchEulerDiscreteScheduler()
    return quiet(StableDiffusion3Pipeline(**parts))


PIPELINES: dict[str, Callable[..., Any]] = {"sd": sd, "sdxl": sdxl, "sd3": sd3}


def denoiser(pipe: Any) -> Any:
    return pipe.transformer if isinstance(pipe, StableDiffusion3Pipeline) else pipe.unet


def prompt(pipe: Any, seed: int = 0, batch: int = 1) -> dict[str, torch.Tensor]:
    """Embeddings as if from a text encoder, with a pooled part where the pipeline wants one."""
    generator = torch.Generator().manual_seed(100 + seed)
    names = {"prompt_embeds": (batch, TOKENS, WIDTH), "negative_prompt_embeds": (batch, TOKENS, WIDTH)}
    if isinstance(pipe, StableDiffusion3Pipeline | StableDiffusionXLPipeline):
        names |= {"pooled_prompt_embeds": (batch, WIDTH), "negative_pooled_prompt_embeds": (batch, WIDTH)}
    dtype = denoiser(pipe).dtype
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in names.items()}


def generate(
    pipe: Any,
    *,
    steps: int = 6,
    size: int = 8,
    seed: int = 0,
    batch: int = 1,
    guidance: float = 4.0,
    **changes: Any,
) -> torch.Tensor:
    """Latents of one call. `seed` is that of the noise and of the prompt."""
    call: dict[str, Any] = {
        "num_inference_steps": steps, "height": size, "width": size, "guidance_scale": guidance,
        "generator": torch.Generator().manual_seed(seed), "output_type": "latent",
        **prompt(pipe, seed, batch),
    }  # fmt: skip
    return pipe(**(call | changes)).images
