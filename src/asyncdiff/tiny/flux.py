"""FLUX.1 and FLUX.2, and Chroma, which was made from FLUX.1."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    ChromaPipeline,
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)

from asyncdiff.tiny.parts import autoencoder, quiet, random_weights
from asyncdiff.tiny.stand_in import TinyCall, TinyPipeline

_TOKENS, _WIDTH, _CHANNELS = 5, 8, 4
_TRANSFORMER: dict[str, Any] = {
    "patch_size": 1, "in_channels": 4 * _CHANNELS, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": _WIDTH, "axes_dims_rope": (4, 4, 8),
}  # fmt: skip


def _scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def _side(call: TinyCall) -> int:
    return 32 if call.large else 16


def _common(call: TinyCall) -> dict[str, Any]:
    return {
        "num_inference_steps": call.steps, "height": _side(call), "width": _side(call), "guidance_scale": 3.5,
        "generator": call.generator(), "output_type": "latent",
    }  # fmt: skip


def _flux_transformer() -> FluxTransformer2DModel:
    return random_weights(
        lambda: FluxTransformer2DModel(
            **_TRANSFORMER,
            num_layers=3,
            num_single_layers=4,
            pooled_projection_dim=_WIDTH,
            guidance_embeds=True,
        )
    )


def _flux(pipeline: type = FluxPipeline, **components: Any) -> Any:
    return quiet(
        pipeline(
            scheduler=_scheduler(),
            vae=autoencoder(_CHANNELS),
            transformer=_flux_transformer(),
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            **components,
        )
    )


def _flux_arguments(call: TinyCall) -> dict[str, Any]:
    prompt, pooled = call.randn(call.batch, _TOKENS, _WIDTH), call.randn(call.batch, _WIDTH)
    return {"prompt_embeds": prompt, "pooled_prompt_embeds": pooled, **_common(call)}


def _true_cfg_arguments(call: TinyCall) -> dict[str, Any]:
    arguments = _flux_arguments(call)
    return arguments | {
        "negative_prompt_embeds": -arguments["prompt_embeds"],
        "negative_pooled_prompt_embeds": -arguments["pooled_prompt_embeds"],
        "true_cfg_scale": 3.0,
    }


def _kontext_arguments(call: TinyCall) -> dict[str, Any]:
    side = _side(call)
    picture = call.randn(call.batch, 3, side, side).clamp(0, 1)
    return _flux_arguments(call) | {"image": picture, "max_area": side * side, "_auto_resize": False}


def _flux_controlnet() -> Any:
    controlnet = random_weights(
        lambda: FluxControlNetModel(
            **_TRANSFORMER,
            num_layers=2,
            num_single_layers=1,
            pooled_projection_dim=_WIDTH,
            guidance_embeds=True,
        ),
        seed=2,
    )
    return _flux(FluxControlNetPipeline, controlnet=controlnet)


def _controlnet_arguments(call: TinyCall) -> dict[str, Any]:
    picture = call.randn(call.batch, 3, _side(call), _side(call)).clamp(0, 1)
    return _flux_arguments(call) | {"control_image": picture, "controlnet_conditioning_scale": 0.7}


def _flux2() -> Flux2Pipeline:
    transformer = random_weights(
        lambda: Flux2Transformer2DModel(
            **(_TRANSFORMER | {"axes_dims_rope": (4, 4, 4, 4)}),
            num_layers=2,
            num_single_layers=4,
            timestep_guidance_channels=8,
        )
    )
    vae = random_weights(
        lambda: AutoencoderKLFlux2(
            block_out_channels=(4,),
            norm_num_groups=2,
            latent_channels=_CHANNELS,
            down_block_types=("DownEncoderBlock2D",),
            up_block_types=("UpDecoderBlock2D",),
        ),
        seed=1,
    )
    return quiet(
        Flux2Pipeline(
            scheduler=_scheduler(), vae=vae, text_encoder=None, tokenizer=None, transformer=transformer
        )
    )


def _flux2_arguments(call: TinyCall) -> dict[str, Any]:
    return {"prompt_embeds": call.randn(call.batch, _TOKENS, _WIDTH), **_common(call)}


def _chroma() -> ChromaPipeline:
    transformer = random_weights(
        lambda: ChromaTransformer2DModel(
            **_TRANSFORMER,
            num_layers=2,
            num_single_layers=3,
            approximator_num_channels=8,
            approximator_hidden_dim=16,
            approximator_layers=1,
        )
    )
    return quiet(
        ChromaPipeline(
            scheduler=_scheduler(),
            vae=autoencoder(_CHANNELS),
            text_encoder=None,
            tokenizer=None,
            transformer=transformer,
        )
    )


def _chroma_arguments(call: TinyCall) -> dict[str, Any]:
    prompt, negative = call.randn(2, call.batch, _TOKENS, _WIDTH)
    mask = torch.ones(call.batch, _TOKENS)
    negative_mask = mask.clone()
    negative_mask[:, 3:] = 0  # a shorter prompt, padded
    return {
        "prompt_embeds": prompt, "prompt_attention_mask": mask,
        "negative_prompt_embeds": negative, "negative_prompt_attention_mask": negative_mask, **_common(call),
    }  # fmt: skip


FAMILIES = (
    TinyPipeline("flux", _flux, _flux_arguments),
    TinyPipeline("flux-true-cfg", _flux, _true_cfg_arguments, calls_per_step=2),
    TinyPipeline("flux-kontext", lambda: _flux(FluxKontextPipeline), _kontext_arguments),
    TinyPipeline("flux-controlnet", _flux_controlnet, _controlnet_arguments),
    TinyPipeline("flux2", _flux2, _flux2_arguments),
    TinyPipeline("chroma", _chroma, _chroma_arguments, calls_per_step=2),
)
