"""Transformers that make pictures: Stable Diffusion 3.5, PixArt, Sana, HunyuanDiT, AuraFlow, CogView4,
Lumina 2, Z-Image, HiDream.

FLUX, Qwen-Image and OmniGen have files of their own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)

from asyncdiff.tiny.parts import autoencoder, quiet, random_weights
from asyncdiff.tiny.stand_in import TinyCall, TinyPipeline

_TOKENS, _WIDTH = 5, 8


def _flow_matching() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def _common(call: TinyCall, side: int) -> dict[str, Any]:
    side = 2 * side if call.large else side
    return {
        "num_inference_steps": call.steps, "height": side, "width": side, "guidance_scale": 4.0,
        "generator": call.generator(), "output_type": "latent",
    }  # fmt: skip


def _prompts(call: TinyCall) -> dict[str, Any]:
    prompt, negative = call.randn(2, call.batch, _TOKENS, _WIDTH)
    return {"prompt_embeds": prompt, "negative_prompt_embeds": negative}


def _masked_prompts(
    call: TinyCall, *, dtype: torch.dtype = torch.float32, suffix: str = ""
) -> dict[str, Any]:
    """With masks: the negative prompt is shorter and padded, the last prompt of a batch too."""
    prompt, negative = call.randn(2, call.batch, _TOKENS, _WIDTH)
    mask = torch.ones(call.batch, _TOKENS, dtype=dtype)
    negative_mask = mask.clone()
    negative_mask[:, 3:] = 0
    mask[1:, 4:] = 0
    return {
        f"prompt_embeds{suffix}": prompt, f"prompt_attention_mask{suffix}": mask,
        f"negative_prompt_embeds{suffix}": negative, f"negative_prompt_attention_mask{suffix}": negative_mask,
    }  # fmt: skip


def _without_encoders(pipeline: type, transformer: Any, scheduler: Any, **components: Any) -> Any:
    parts = {"vae": autoencoder(), "text_encoder": None, "tokenizer": None} | components
    return quiet(pipeline(transformer=transformer, scheduler=scheduler, **parts))


def _sd35_transformer() -> SD3Transformer2DModel:
    return random_weights(
        lambda: SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            num_layers=6,
            attention_head_dim=4,
            num_attention_heads=2,
            caption_projection_dim=8,
            joint_attention_dim=_WIDTH,
            pooled_projection_dim=_WIDTH,
            out_channels=4,
            pos_embed_max_size=32,
            dual_attention_layers=(0, 1),
            qk_norm="rms_norm",
        )
    )


def _sd35() -> StableDiffusion3Pipeline:
    others = dict.fromkeys(("text_encoder_2", "text_encoder_3", "tokenizer_2", "tokenizer_3"))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return _without_encoders(StableDiffusion3Pipeline, _sd35_transformer(), scheduler, **others)


def _sd35_arguments(call: TinyCall) -> dict[str, Any]:
    pooled, negative = call.randn(2, call.batch, _WIDTH)
    return {
        "pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": negative, **_prompts(call),
        **_common(call, 16),
    }  # fmt: skip


def _skip_layer_arguments(call: TinyCall) -> dict[str, Any]:
    return _sd35_arguments(call) | {
        "skip_guidance_layers": [2, 3], "skip_layer_guidance_start": -1.0, "skip_layer_guidance_stop": 1.0,
    }  # fmt: skip


def _pixart(pipeline: type, scheduler: Any, **config: Any) -> Any:
    transformer = random_weights(
        lambda: PixArtTransformer2DModel(
            num_layers=4,
            attention_head_dim=4,
            num_attention_heads=3,
            in_channels=4,
            cross_attention_dim=12,
            caption_channels=_WIDTH,
            out_channels=8,
            norm_num_groups=1,
            **config,
        )
    )
    return _without_encoders(pipeline, transformer, scheduler)


def _pixart_alpha() -> PixArtAlphaPipeline:
    # The size of the real one: only then is the transformer told the resolution. Large patches keep its table
    # of positions small.
    config = {"sample_size": 128, "patch_size": 8, "use_additional_conditions": True}
    return _pixart(PixArtAlphaPipeline, DPMSolverMultistepScheduler(), **config)


def _pixart_sigma() -> PixArtSigmaPipeline:
    config = {"sample_size": 16, "patch_size": 2, "use_additional_conditions": False}
    return _pixart(PixArtSigmaPipeline, DPMSolverMultistepScheduler(), **config)


def _pixart_arguments(call: TinyCall) -> dict[str, Any]:
    prompts = _masked_prompts(call) | {"negative_prompt": None}
    return prompts | _common(call, 32) | {"use_resolution_binning": False}


def _sana() -> SanaPipeline:
    transformer = random_weights(
        lambda: SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            patch_size=1,
            num_layers=4,
            num_attention_heads=2,
            attention_head_dim=4,
            num_cross_attention_heads=2,
            cross_attention_head_dim=4,
            cross_attention_dim=8,
            caption_channels=_WIDTH,
            sample_size=16,
        )
    )
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return _without_encoders(SanaPipeline, transformer, scheduler, vae=None)


def _sana_arguments(call: TinyCall) -> dict[str, Any]:
    prompts = _masked_prompts(call) | {"negative_prompt": None}
    return prompts | _common(call, 256) | {"use_resolution_binning": False}


def _hunyuan_dit() -> HunyuanDiTPipeline:
    """The second half of the layers gets what the first half put out: long skips."""
    transformer = random_weights(
        lambda: HunyuanDiT2DModel(
            sample_size=16,
            num_layers=6,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            in_channels=4,
            cross_attention_dim=_WIDTH,
            cross_attention_dim_t5=_WIDTH,
            pooled_projection_dim=4,
            hidden_size=16,
            text_len=_TOKENS,
            text_len_t5=_TOKENS,
            activation_fn="gelu-approximate",
            norm_type="ada_norm_continous",
        )
    )
    scheduler = DDPMScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear")
    others = {
        "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False,
        "text_encoder_2": None, "tokenizer_2": None, "vae": autoencoder(levels=4),
    }  # fmt: skip
    return _without_encoders(HunyuanDiTPipeline, transformer, scheduler, **others)


def _hunyuan_dit_arguments(call: TinyCall) -> dict[str, Any]:
    """Two text encoders, which say different things."""
    second = replace(call, seed=call.seed + 100)
    prompts = _masked_prompts(call, dtype=torch.long)
    prompts |= _masked_prompts(second, dtype=torch.long, suffix="_2")
    return prompts | _common(call, 128) | {"use_resolution_binning": False}


def _aura_flow() -> AuraFlowPipeline:
    transformer = random_weights(
        lambda: AuraFlowTransformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            num_mmdit_layers=2,
            num_single_dit_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=_WIDTH,
            caption_projection_dim=16,
            out_channels=4,
            pos_embed_max_size=256,
        )
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.73)
    return _without_encoders(AuraFlowPipeline, transformer, scheduler)


def _cogview4() -> CogView4Pipeline:
    transformer = random_weights(
        lambda: CogView4Transformer2DModel(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=4,
            attention_head_dim=8,
            num_attention_heads=2,
            text_embed_dim=_WIDTH,
            time_embed_dim=8,
            condition_dim=4,
            pos_embed_max_size=32,
            sample_size=16,
            rope_axes_dim=(8, 8),
        )
    )
    return _without_encoders(CogView4Pipeline, transformer, _flow_matching())


def _lumina2() -> Lumina2Pipeline:
    transformer = random_weights(
        lambda: Lumina2Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            hidden_size=24,
            num_layers=3,
            num_refiner_layers=1,
            num_attention_heads=3,
            num_kv_heads=1,
            multiple_of=2,
            axes_dim_rope=(4, 2, 2),
            axes_lens=(128, 128, 128),
            cap_feat_dim=_WIDTH,
        )
    )
    return _without_encoders(Lumina2Pipeline, transformer, _flow_matching(), vae=autoencoder(levels=4))


def _lumina2_arguments(call: TinyCall) -> dict[str, Any]:
    return _masked_prompts(call, dtype=torch.bool) | _common(call, 128)


def _z_image() -> ZImagePipeline:
    transformer = random_weights(
        lambda: ZImageTransformer2DModel(
            all_patch_size=(2,),
            all_f_patch_size=(1,),
            in_channels=4,
            dim=16,
            n_layers=3,
            n_refiner_layers=1,
            n_heads=1,
            n_kv_heads=1,
            cap_feat_dim=_WIDTH,
            axes_dims=[8, 4, 4],
            axes_lens=[256, 32, 32],
        )
    )
    return _without_encoders(ZImagePipeline, transformer, _flow_matching())


def _z_image_arguments(call: TinyCall) -> dict[str, Any]:
    """Lists with a tensor for each picture, as long as its prompt; so are the denoiser's inputs."""
    prompts = call.randn(2, call.batch, 9, _WIDTH)
    positive, negative = ([prompt[: 6 + i] for i, prompt in enumerate(some)] for some in prompts)
    return {"prompt_embeds": positive, "negative_prompt_embeds": negative, **_common(call, 16)}


def _hidream() -> HiDreamImagePipeline:
    """A mixture of experts: which of them a token goes to is decided by its value."""
    transformer = random_weights(
        lambda: HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_channels=[_WIDTH, _WIDTH],
            text_emb_dim=_WIDTH,
            num_routed_experts=4,
            num_activated_experts=2,
            axes_dims_rope=(4, 2, 2),
            max_resolution=(24, 24),
            llama_layers=(0, 1, 1, 0),
        )
    )
    names = [f"{kind}_{i}" for kind in ("text_encoder", "tokenizer") for i in (2, 3, 4)]
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = _without_encoders(HiDreamImagePipeline, transformer, scheduler, **dict.fromkeys(names))
    pipe.default_sample_size = 16  # whatever is asked for becomes a picture of this area
    return pipe


def _hidream_arguments(call: TinyCall) -> dict[str, Any]:
    t5, negative_t5 = call.randn(2, call.batch, _TOKENS, _WIDTH)
    llama, negative_llama = call.randn(2, 2, call.batch, _TOKENS, _WIDTH)
    pooled, negative_pooled = call.randn(2, call.batch, _WIDTH)
    return {
        "prompt_embeds_t5": t5, "negative_prompt_embeds_t5": negative_t5,
        "prompt_embeds_llama3": llama, "negative_prompt_embeds_llama3": negative_llama,
        "pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": negative_pooled,
        **_common(call, 16), "width": 32 if call.large else 16, "height": 16,
    }  # fmt: skip


FAMILIES = (
    TinyPipeline("sd35", _sd35, _sd35_arguments),
    TinyPipeline("sd35-skip-layers", _sd35, _skip_layer_arguments, calls_per_step=2),
    TinyPipeline("pixart-alpha", _pixart_alpha, _pixart_arguments),
    TinyPipeline("pixart-sigma", _pixart_sigma, _pixart_arguments),
    TinyPipeline("sana", _sana, _sana_arguments),
    TinyPipeline("hunyuan-dit", _hunyuan_dit, _hunyuan_dit_arguments),
    TinyPipeline("aura-flow", _aura_flow, lambda call: _masked_prompts(call) | _common(call, 16)),
    TinyPipeline("cogview4", _cogview4, lambda call: _prompts(call) | _common(call, 16), calls_per_step=2),
    TinyPipeline("lumina2", _lumina2, _lumina2_arguments, calls_per_step=2),
    TinyPipeline("z-image", _z_image, _z_image_arguments),
    TinyPipeline("hidream", _hidream, _hidream_arguments),
)
