"""Video transformers: Wan 2.1 and 2.2, LTX, HunyuanVideo, CogVideoX, Mochi, Latte."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LattePipeline,
    LatteTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)

from asyncdiff.tiny.parts import autoencoder, quiet, random_weights
from asyncdiff.tiny.stand_in import TinyCall, TinyPipeline
from asyncdiff.tiny.text import CLIP_WIDTH, clip_vision, pictures

_TOKENS, _WIDTH, _CHANNELS = 5, 8, 4
_NO_TEXT: dict[str, Any] = {"text_encoder": None, "tokenizer": None}


def _common(call: TinyCall, frames: tuple[int, int] = (5, 9)) -> dict[str, Any]:
    return {
        "height": 32, "width": 32, "num_frames": frames[call.large], "num_inference_steps": call.steps,
        "generator": call.generator(), "output_type": "latent",
    }  # fmt: skip


def _prompts(call: TinyCall, guidance_scale: float = 4.0) -> dict[str, Any]:
    prompt, negative = call.randn(2, call.batch, _TOKENS, _WIDTH)
    return {
        "prompt_embeds": prompt, "negative_prompt_embeds": negative, "guidance_scale": guidance_scale,
    }  # fmt: skip


def _masks(call: TinyCall) -> dict[str, Any]:
    """The negative prompt is shorter, and padded."""
    mask = torch.ones(call.batch, _TOKENS)
    negative = mask.clone()
    negative[:, 3:] = 0
    return {"prompt_attention_mask": mask, "negative_prompt_attention_mask": negative}


def _wan_transformer(seed: int, **changes: Any) -> WanTransformer3DModel:
    config: dict[str, Any] = {
        "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": _CHANNELS,
        "out_channels": _CHANNELS, "text_dim": _WIDTH, "freq_dim": 16, "ffn_dim": 32, "num_layers": 3,
        "cross_attn_norm": True, "rope_max_seq_len": 32,
    }  # fmt: skip
    return random_weights(lambda: WanTransformer3DModel(**(config | changes)), seed)


def _wan_parts(**changes: Any) -> dict[str, Any]:
    vae = random_weights(
        lambda: AutoencoderKLWan(
            base_dim=3,
            z_dim=_CHANNELS,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.1] * _CHANNELS,
            latents_std=[2.0] * _CHANNELS,
        ),
        seed=1,
    )
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return {"vae": vae, "scheduler": scheduler, "transformer": _wan_transformer(0), **_NO_TEXT} | changes


def _wan(**changes: Any) -> WanPipeline:
    return quiet(WanPipeline(**_wan_parts(**changes)))


def _wan_2_2() -> WanPipeline:
    """The first denoiser is for timesteps from 800 on: two steps of four, three of six."""
    return _wan(transformer_2=_wan_transformer(2), boundary_ratio=0.8)


def _wan_image_to_video() -> WanImageToVideoPipeline:
    """Wan 2.1: the picture goes in as latents, and as what an image encoder makes of it."""
    transformer = _wan_transformer(
        0, in_channels=2 * _CHANNELS + 4, image_dim=CLIP_WIDTH, added_kv_proj_dim=24
    )
    encoder, processor = clip_vision()
    parts = _wan_parts(transformer=transformer, image_encoder=encoder, image_processor=processor)
    return quiet(WanImageToVideoPipeline(**parts))


def _wan_arguments(call: TinyCall) -> dict[str, Any]:
    return _common(call) | _prompts(call)


def _wan_image_arguments(call: TinyCall) -> dict[str, Any]:
    return _wan_arguments(call) | {"image": pictures(call, 32)[0]}


def _ltx() -> LTXPipeline:
    transformer = random_weights(
        lambda: LTXVideoTransformer3DModel(
            in_channels=_CHANNELS,
            out_channels=_CHANNELS,
            num_attention_heads=2,
            attention_head_dim=12,
            cross_attention_dim=24,
            num_layers=3,
            caption_channels=_WIDTH,
        )
    )
    vae = random_weights(
        lambda: AutoencoderKLLTXVideo(
            latent_channels=_CHANNELS,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_block_out_channels=(8, 8, 8, 8),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
        ),
        seed=1,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return quiet(LTXPipeline(scheduler=scheduler, vae=vae, transformer=transformer, **_NO_TEXT))


def _ltx_arguments(call: TinyCall) -> dict[str, Any]:
    sizes = {"height": 64, "width": 64}
    return _common(call, frames=(9, 17)) | _prompts(call) | _masks(call) | sizes


def _hunyuan() -> HunyuanVideoPipeline:
    transformer = random_weights(
        lambda: HunyuanVideoTransformer3DModel(
            in_channels=_CHANNELS,
            out_channels=_CHANNELS,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=2,
            num_single_layers=3,
            num_refiner_layers=1,
            text_embed_dim=_WIDTH,
            pooled_projection_dim=_WIDTH,
            rope_axes_dim=(4, 4, 4),
        )
    )
    levels = 4
    vae = random_weights(
        lambda: AutoencoderKLHunyuanVideo(
            latent_channels=_CHANNELS,
            block_out_channels=(4,) * levels,
            layers_per_block=1,
            norm_num_groups=2,
        ),
        seed=1,
    )
    return quiet(
        HunyuanVideoPipeline(
            transformer=transformer,
            vae=vae,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
            text_encoder_2=None,
            tokenizer_2=None,
            **_NO_TEXT,
        )
    )


def _hunyuan_arguments(call: TinyCall) -> dict[str, Any]:
    pooled, negative_pooled = call.randn(2, call.batch, _WIDTH)
    return _common(call) | _prompts(call, 6.0) | _masks(call) | {
        "pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": negative_pooled,
    }  # fmt: skip


def _hunyuan_true_cfg_arguments(call: TinyCall) -> dict[str, Any]:
    return _hunyuan_arguments(call) | {"true_cfg_scale": 3.0}


def _cogvideox() -> CogVideoXPipeline:
    """With rotary embeddings, as the 5B one: the frames may then be of any number."""
    transformer = random_weights(
        lambda: CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=_CHANNELS,
            out_channels=_CHANNELS,
            time_embed_dim=8,
            text_embed_dim=_WIDTH,
            num_layers=3,
            sample_width=8,
            sample_height=8,
            sample_frames=5,
            max_text_seq_length=_TOKENS,
            use_rotary_positional_embeddings=True,
        )
    )
    vae = random_weights(
        lambda: AutoencoderKLCogVideoX(
            block_out_channels=(8, 8, 8, 8),
            latent_channels=_CHANNELS,
            layers_per_block=1,
            norm_num_groups=2,
        ),
        seed=1,
    )
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    return quiet(CogVideoXPipeline(vae=vae, transformer=transformer, scheduler=scheduler, **_NO_TEXT))


def _cogvideox_arguments(call: TinyCall) -> dict[str, Any]:
    return _common(call) | _prompts(call)


def _mochi() -> MochiPipeline:
    transformer = random_weights(
        lambda: MochiTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=3,
            pooled_projection_dim=16,
            in_channels=12,
            text_embed_dim=_WIDTH,
            time_embed_dim=8,
            max_sequence_length=_TOKENS,
        )
    )
    vae = random_weights(
        lambda: AutoencoderKLMochi(
            encoder_block_out_channels=(32,) * 4,
            decoder_block_out_channels=(32,) * 4,
            layers_per_block=(1,) * 5,
            add_attention_block=(False,) * 5,
        ),
        seed=1,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    return quiet(MochiPipeline(scheduler=scheduler, vae=vae, transformer=transformer, **_NO_TEXT))


def _mochi_arguments(call: TinyCall) -> dict[str, Any]:
    return _common(call, frames=(7, 13)) | _prompts(call) | _masks(call)


def _latte() -> LattePipeline:
    transformer = random_weights(
        lambda: LatteTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=3,
            cross_attention_dim=16,
            attention_bias=True,
            sample_size=8,
            patch_size=2,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            caption_channels=_WIDTH,
            video_length=4,
        )
    )
    return quiet(
        LattePipeline(vae=autoencoder(), transformer=transformer, scheduler=DDIMScheduler(), **_NO_TEXT)
    )


def _latte_arguments(call: TinyCall) -> dict[str, Any]:
    """Of a fixed number of frames, so another resolution."""
    side = 16 if call.large else 8
    arguments = _common(call) | _prompts(call) | {"height": side, "width": side, "video_length": 4}
    del arguments["num_frames"]
    return arguments | {"negative_prompt": None}  # its default, "", counts as a second one


FAMILIES = (
    TinyPipeline("wan-2.1", _wan, _wan_arguments, calls_per_step=2),
    TinyPipeline(
        "wan-2.2", _wan_2_2, _wan_arguments, denoisers=("transformer", "transformer_2"), calls_per_step=2
    ),
    TinyPipeline("wan-2.2-5b", lambda: _wan(expand_timesteps=True), _wan_arguments, calls_per_step=2),
    TinyPipeline("wan-image-to-video", _wan_image_to_video, _wan_image_arguments, calls_per_step=2),
    TinyPipeline("ltx", _ltx, _ltx_arguments),
    TinyPipeline("hunyuan-video", _hunyuan, _hunyuan_arguments),
    TinyPipeline("hunyuan-video-true-cfg", _hunyuan, _hunyuan_true_cfg_arguments, calls_per_step=2),
    TinyPipeline("cogvideox", _cogvideox, _cogvideox_arguments),
    TinyPipeline("mochi", _mochi, _mochi_arguments),
    TinyPipeline("latte", _latte, _latte_arguments),
)
