"""U-Nets besides Stable Diffusion's (Kandinsky 3, Stable Cascade, video, without a prompt), and sound."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderOobleck,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DDPMWuerstchenScheduler,
    EDMDPMSolverMultistepScheduler,
    I2VGenXLPipeline,
    I2VGenXLUNet,
    Kandinsky3Pipeline,
    Kandinsky3UNet,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
    StableCascadeCombinedPipeline,
    StableCascadeDecoderPipeline,
    StableCascadePriorPipeline,
    StableCascadeUNet,
    TextToVideoSDPipeline,
    UNet2DModel,
    UNet3DConditionModel,
    VQModel,
)
from diffusers.pipelines.stable_cascade.pipeline_stable_cascade import PaellaVQModel

from asyncdiff.tiny.parts import autoencoder, quiet, random_weights
from asyncdiff.tiny.stand_in import TinyCall, TinyPipeline
from asyncdiff.tiny.text import CLIP_WIDTH, clip, clip_vision, pictures, prompts

_TOKENS, _WIDTH, _CHANNELS = 5, 8, 4
_NO_TEXT: dict[str, Any] = {"text_encoder": None, "tokenizer": None}


def _side(call: TinyCall, small: int = 8) -> int:
    return 2 * small if call.large else small


def _common(call: TinyCall) -> dict[str, Any]:
    return {
        "num_inference_steps": call.steps, "generator": call.generator(), "output_type": "latent",
    }  # fmt: skip


def _prompts(call: TinyCall, tokens: int = _TOKENS) -> dict[str, Any]:
    prompt, negative = call.randn(2, call.batch, tokens, _WIDTH)
    return {"prompt_embeds": prompt, "negative_prompt_embeds": negative, "guidance_scale": 4.0}


def _kandinsky_3() -> Kandinsky3Pipeline:
    unet = random_weights(
        lambda: Kandinsky3UNet(
            time_embedding_dim=16,
            groups=2,
            attention_head_dim=4,
            layers_per_block=2,
            block_out_channels=(8, 16),
            cross_attention_dim=_WIDTH,
            encoder_hid_dim=_WIDTH,
        )
    )
    movq = random_weights(
        lambda: VQModel(
            block_out_channels=(32,) * 4,
            norm_num_groups=4,
            num_vq_embeddings=8,
            norm_type="spatial",
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=_CHANNELS,
            vq_embed_dim=_CHANNELS,
        ),
        seed=1,
    )
    return quiet(Kandinsky3Pipeline(unet=unet, movq=movq, scheduler=DDPMScheduler(), **_NO_TEXT))


def _kandinsky_3_arguments(call: TinyCall) -> dict[str, Any]:
    side = _side(call, 64)
    mask = torch.ones(call.batch, _TOKENS)
    negative_mask = mask.clone()
    negative_mask[:, 3:] = 0  # a shorter prompt, padded
    return _common(call) | _prompts(call) | {
        "height": side, "width": side, "attention_mask": mask, "negative_attention_mask": negative_mask,
    }  # fmt: skip


def _cascade_unet(seed: int, **changes: Any) -> StableCascadeUNet:
    """Blocks are repeated with other weights between them, so modules are called several times."""
    config: dict[str, Any] = {
        "conditioning_dim": 16, "timestep_ratio_embedding_dim": 8, "block_out_channels": (8, 16),
        "num_attention_heads": (2, 2), "down_num_layers_per_block": (1, 2),
        "up_num_layers_per_block": (2, 1), "clip_text_pooled_in_channels": CLIP_WIDTH, "clip_seq": 2,
    }  # fmt: skip
    return random_weights(lambda: StableCascadeUNet(**(config | changes)), seed)


def _prior_unet() -> StableCascadeUNet:
    return _cascade_unet(
        0,
        in_channels=16,
        out_channels=16,
        clip_text_in_channels=CLIP_WIDTH,
        clip_image_in_channels=CLIP_WIDTH,
        block_out_channels=(16, 16),
        switch_level=(False,),
    )


def _decoder_unet() -> StableCascadeUNet:
    return _cascade_unet(
        2, in_channels=4, out_channels=4, patch_size=2, effnet_in_channels=16, pixel_mapper_in_channels=3,
        down_blocks_repeat_mappers=(1, 1), up_blocks_repeat_mappers=(3, 2), self_attn=False,
        block_types_per_layer=(
            ("SDCascadeResBlock", "SDCascadeTimestepBlock"),
            ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
        ),
        timestep_conditioning_type=("sca",),
    )  # fmt: skip


def _vqgan() -> PaellaVQModel:
    return random_weights(
        lambda: PaellaVQModel(bottleneck_blocks=1, embed_dim=8, num_vq_embeddings=8), seed=1
    )


def _cascade_prior() -> StableCascadePriorPipeline:
    encoder, tokenizer = clip(projection=True)
    return quiet(
        StableCascadePriorPipeline(
            prior=_prior_unet(),
            scheduler=DDPMWuerstchenScheduler(),
            text_encoder=encoder,
            tokenizer=tokenizer,
        )
    )


def _cascade_decoder() -> StableCascadeDecoderPipeline:
    encoder, tokenizer = clip(projection=True)
    return quiet(
        StableCascadeDecoderPipeline(
            decoder=_decoder_unet(),
            scheduler=DDPMWuerstchenScheduler(),
            vqgan=_vqgan(),
            text_encoder=encoder,
            tokenizer=tokenizer,
        )
    )


def _cascade() -> StableCascadeCombinedPipeline:
    encoder, tokenizer = clip(projection=True)
    return quiet(
        StableCascadeCombinedPipeline(
            decoder=_decoder_unet(),
            scheduler=DDPMWuerstchenScheduler(),
            vqgan=_vqgan(),
            text_encoder=encoder,
            tokenizer=tokenizer,
            prior_prior=_prior_unet(),
            prior_scheduler=DDPMWuerstchenScheduler(),
            prior_text_encoder=encoder,
            prior_tokenizer=tokenizer,
        )
    )


def _cascade_prior_arguments(call: TinyCall) -> dict[str, Any]:
    """The result is a picture's embedding, which nothing decodes."""
    side = _side(call, 128)
    return _common(call) | {
        "prompt": prompts(call), "height": side, "width": side, "output_type": "pt", "guidance_scale": 4.0,
    }  # fmt: skip


def _cascade_decoder_arguments(call: TinyCall) -> dict[str, Any]:
    side = _side(call, 3)
    embeddings = call.randn(call.batch, 16, side, side)
    return _common(call) | {
        "prompt": prompts(call), "image_embeddings": embeddings, "guidance_scale": 1.1,
    }  # fmt: skip


def _cascade_arguments(call: TinyCall) -> dict[str, Any]:
    side = _side(call, 128)
    return _common(call) | {
        "prompt": prompts(call), "height": side, "width": side, "prior_guidance_scale": 4.0,
        "decoder_guidance_scale": 1.1, "prior_num_inference_steps": call.steps + 1,
    }  # fmt: skip


def _video_unet(unet: type) -> Any:
    return random_weights(
        lambda: unet(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
            cross_attention_dim=_WIDTH,
            attention_head_dim=4,
        )
    )


def _video_arguments(call: TinyCall) -> dict[str, Any]:
    side, frames = _side(call), 3 if call.large else 4
    return _common(call) | _prompts(call) | {"height": side, "width": side, "num_frames": frames}


def _text_to_video() -> TextToVideoSDPipeline:
    unet = _video_unet(UNet3DConditionModel)
    return quiet(TextToVideoSDPipeline(vae=autoencoder(), unet=unet, scheduler=DDIMScheduler(), **_NO_TEXT))


def _i2vgen() -> I2VGenXLPipeline:
    encoder, processor = clip_vision()
    return quiet(
        I2VGenXLPipeline(
            vae=autoencoder(),
            unet=_video_unet(I2VGenXLUNet),
            scheduler=DDIMScheduler(),
            image_encoder=encoder,
            feature_extractor=processor,
            **_NO_TEXT,
        )
    )


def _i2vgen_arguments(call: TinyCall) -> dict[str, Any]:
    torch.manual_seed(call.seed)  # the pipeline draws the picture's latents without the call's generator
    return _video_arguments(call) | {"image": pictures(call, _side(call))}


def _unconditional_unet() -> UNet2DModel:
    return random_weights(
        lambda: UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
    )


def _unconditional_arguments(call: TinyCall) -> dict[str, Any]:
    """Of one resolution, so another number of pictures."""
    return {
        "batch_size": 3 if call.large else call.batch, "num_inference_steps": call.steps,
        "generator": call.generator(), "output_type": "np",
    }  # fmt: skip


def _stable_audio() -> StableAudioPipeline:
    transformer = random_weights(
        lambda: StableAudioDiTModel(
            sample_size=16,
            in_channels=_CHANNELS,
            out_channels=_CHANNELS,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=4,
            num_key_value_attention_heads=2,
            cross_attention_dim=_WIDTH,
            time_proj_dim=8,
            global_states_input_dim=2 * _WIDTH,
            cross_attention_input_dim=_WIDTH,
        )
    )
    vae = random_weights(
        lambda: AutoencoderOobleck(
            encoder_hidden_size=4,
            downsampling_ratios=[2, 2],
            channel_multiples=[1, 2],
            decoder_channels=4,
            decoder_input_channels=_CHANNELS,
            sampling_rate=8,
        ),
        seed=1,
    )
    projection = random_weights(lambda: StableAudioProjectionModel(_WIDTH, _WIDTH, 0, 8), seed=2)
    scheduler = EDMDPMSolverMultistepScheduler(
        sigma_min=0.3, sigma_max=500.0, sigma_data=1.0, solver_order=2, prediction_type="v_prediction",
        sigma_schedule="exponential",
    )  # fmt: skip
    return quiet(
        StableAudioPipeline(
            vae=vae, projection_model=projection, transformer=transformer, scheduler=scheduler, **_NO_TEXT
        )
    )


def _stable_audio_arguments(call: TinyCall) -> dict[str, Any]:
    """Of one length, so a longer prompt."""
    return _common(call) | _prompts(call, tokens=7 if call.large else _TOKENS) | {"audio_end_in_s": 6.0}


FAMILIES = (
    TinyPipeline("kandinsky-3", _kandinsky_3, _kandinsky_3_arguments, denoisers=("unet",)),
    TinyPipeline("stable-cascade-prior", _cascade_prior, _cascade_prior_arguments, denoisers=("prior",)),
    TinyPipeline(
        "stable-cascade-decoder", _cascade_decoder, _cascade_decoder_arguments, denoisers=("decoder",)
    ),
    TinyPipeline("stable-cascade", _cascade, _cascade_arguments, denoisers=("prior_prior", "decoder")),
    TinyPipeline("text-to-video", _text_to_video, _video_arguments, denoisers=("unet",)),
    TinyPipeline("i2vgen-xl", _i2vgen, _i2vgen_arguments, denoisers=("unet",)),
    TinyPipeline(
        "unconditional-ddpm",
        lambda: quiet(DDPMPipeline(_unconditional_unet(), DDPMScheduler())),
        _unconditional_arguments,
        denoisers=("unet",),
    ),
    TinyPipeline(
        "unconditional-ddim",
        lambda: quiet(DDIMPipeline(_unconditional_unet(), DDIMScheduler())),
        _unconditional_arguments,
        denoisers=("unet",),
    ),
    TinyPipeline("stable-audio", _stable_audio, _stable_audio_arguments),
)
