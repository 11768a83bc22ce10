"""Qwen-Image and Qwen-Image-Edit."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)

from asyncdiff.tiny.parts import quiet, random_weights
from asyncdiff.tiny.stand_in import TinyCall, TinyPipeline
from asyncdiff.tiny.text import pictures

_CHANNELS, _WIDTH = 4, 16
_LEVELS = 5
_FACTOR = 2**_LEVELS


def _qwen_transformer() -> QwenImageTransformer2DModel:
    return random_weights(
        lambda: QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=4 * _CHANNELS,
            out_channels=_CHANNELS,
            num_layers=4,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=_WIDTH,
            axes_dims_rope=(8, 4, 4),
        )
    )


def _vae() -> AutoencoderKLQwenImage:
    # Shrinks by 32 instead of 8: the edit pipeline encodes its picture at a million pixels, however small.
    return random_weights(
        lambda: AutoencoderKLQwenImage(
            base_dim=2,
            z_dim=_CHANNELS,
            dim_mult=[1] * (_LEVELS + 1),
            num_res_blocks=1,
            temperal_downsample=[False] * _LEVELS,
            latents_mean=[0.0] * _CHANNELS,
            latents_std=[1.0] * _CHANNELS,
        ),
        seed=1,
    )


def _pipeline(pipeline: type, **components: Any) -> Any:
    return quiet(
        pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=_vae(),
            text_encoder=None,
            tokenizer=None,
            transformer=_qwen_transformer(),
            **components,
        )
    )


def _arguments(call: TinyCall, negative_tokens: int) -> dict[str, Any]:
    side = _FACTOR * (16 if call.large else 8)
    prompt = call.randn(call.batch, 7, _WIDTH)
    mask = torch.ones(call.batch, 7, dtype=torch.long)
    mask[-1, 5:] = 0  # a shorter prompt, padded
    return {
        "prompt_embeds": prompt, "prompt_embeds_mask": mask,
        "negative_prompt_embeds": -prompt[:, :negative_tokens],
        "negative_prompt_embeds_mask": mask[:, :negative_tokens],
        "true_cfg_scale": 3.0, "num_inference_steps": call.steps, "height": side, "width": side,
        "generator": call.generator(), "output_type": "latent",
    }  # fmt: skip


def _edit_arguments(call: TinyCall) -> dict[str, Any]:
    return _arguments(call, negative_tokens=4) | {"image": pictures(call, side=64)[0]}


FAMILIES = (
    TinyPipeline(
        "qwen-image", lambda: _pipeline(QwenImagePipeline), lambda call: _arguments(call, 7), calls_per_step=2
    ),
    TinyPipeline(
        "qwen-image-edit",
        lambda: _pipeline(QwenImageEditPipeline, processor=None),
        _edit_arguments,
        calls_per_step=2,
    ),
)
