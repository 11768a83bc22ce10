"""Video from U-Nets: Stable Video Diffusion and AnimateDiff."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKLTemporalDecoder,
    DDIMScheduler,
    EulerDiscreteScheduler,
    MotionAdapter,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
)

from asyncdiff.tiny.parts import quiet, random_weights
from asyncdiff.tiny.stable_diffusion import one_text_encoder, unet, vae
from asyncdiff.tiny.stand_in import TinyCall, TinyPipeline
from asyncdiff.tiny.text import CLIP_WIDTH, clip_vision, pictures, prompts

_TIME_ID_WIDTH = 4


def _svd() -> StableVideoDiffusionPipeline:
    levels, num_time_ids = 4, 3
    groups = 32  # of all its normalisations; one channel in each would take the timestep out again
    autoencoder: dict[str, Any] = {
        "block_out_channels": (groups,) * levels, "down_block_types": ("DownEncoderBlock2D",) * levels,
        "latent_channels": 4,
    }  # fmt: skip
    denoiser: dict[str, Any] = {
        "sample_size": 8, "block_out_channels": (groups, 2 * groups), "layers_per_block": 1, "num_frames": 4,
        "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        "num_attention_heads": 2, "cross_attention_dim": CLIP_WIDTH,
        "addition_time_embed_dim": _TIME_ID_WIDTH,
        "projection_class_embeddings_input_dim": num_time_ids * _TIME_ID_WIDTH,
    }  # fmt: skip
    encoder, processor = clip_vision()
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        steps_offset=1, timestep_spacing="leading", timestep_type="continuous", use_karras_sigmas=True,
        sigma_min=0.002, sigma_max=700.0,
    )  # fmt: skip
    pipe = StableVideoDiffusionPipeline(
        vae=random_weights(lambda: AutoencoderKLTemporalDecoder(**autoencoder), seed=1),
        image_encoder=encoder,
        unet=random_weights(lambda: UNetSpatioTemporalConditionModel(**denoiser)),
        scheduler=scheduler,
        feature_extractor=processor,
    )
    return quiet(pipe)


def _animatediff() -> AnimateDiffPipeline:
    adapter: dict[str, Any] = {
        "block_out_channels": (8, 16), "motion_layers_per_block": 1, "motion_num_attention_heads": 2,
        "motion_norm_num_groups": 4, "motion_max_seq_length": 32,
    }  # fmt: skip
    pipe = AnimateDiffPipeline(
        unet=unet(),
        vae=vae(),
        motion_adapter=random_weights(lambda: MotionAdapter(**adapter), seed=3),
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="linear", timestep_spacing="linspace",
            steps_offset=1, clip_sample=False, set_alpha_to_one=False,
        ),
        **one_text_encoder(),
    )  # fmt: skip
    pipe.unet.eval()  # a new module, made of U-Net and adapter
    return quiet(pipe)


def _size(call: TinyCall) -> dict[str, Any]:
    side, frames = (128, 3) if call.large else (64, 4)
    return {"height": side, "width": side, "num_frames": frames}


def _from_picture(call: TinyCall) -> dict[str, Any]:
    return _size(call) | {
        "image": pictures(call, 64), "num_inference_steps": call.steps, "generator": call.generator(),
        "output_type": "latent",
    }  # fmt: skip


def _from_text(call: TinyCall) -> dict[str, Any]:
    return _size(call) | {
        "prompt": prompts(call), "num_inference_steps": call.steps, "guidance_scale": 4.0,
        "generator": call.generator(), "output_type": "latent",
    }  # fmt: skip


FAMILIES = (
    TinyPipeline("svd", _svd, _from_picture, ("unet",)),
    TinyPipeline("animatediff", _animatediff, _from_text, ("unet",)),
)
