"""Stable Diffusion 1.5 and its relatives, each with the noise scheduler of its published checkpoint."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image

from asyncdiff.tiny.parts import autoencoder, quiet, random_weights
from asyncdiff.tiny.stand_in import TinyCall, TinyPipeline
from asyncdiff.tiny.text import CLIP_WIDTH, T5_WIDTH, clip, pictures, prompts, t5

_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
_V_PREDICTION = {"prediction_type": "v_prediction", "set_alpha_to_one": False, "clip_sample": False}
_TIME_ID_WIDTH = 4


def unet(**changes: Any) -> UNet2DConditionModel:
    """Latents of 8x8 on two levels, cross attention on the first."""
    config: dict[str, Any] = {
        "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
        "cross_attention_dim": CLIP_WIDTH, "attention_head_dim": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    return random_weights(lambda: UNet2DConditionModel(**(config | changes)))


def vae(levels: int = 4, **changes: Any) -> AutoencoderKL:
    """Pictures to latents of four channels, halved `levels - 1` times."""
    return autoencoder(
        block_out_channels=(4,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        **changes,
    )


def one_text_encoder() -> dict[str, Any]:
    """The text components of Stable Diffusion 1 and 2."""
    encoder, tokenizer = clip()
    return {"text_encoder": encoder, "tokenizer": tokenizer}


_UNCHECKED = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def _sd15(pipeline: type = StableDiffusionPipeline, **components: Any) -> Any:
    parts = {"unet": unet(), "vae": vae(), "scheduler": PNDMScheduler(skip_prk_steps=True, **_BETAS)}
    return quiet(pipeline(**(parts | one_text_encoder() | _UNCHECKED | components)))


def _sd21() -> StableDiffusionPipeline:
    return _sd15(
        unet=unet(use_linear_projection=True, attention_head_dim=(2, 4)),
        scheduler=DDIMScheduler(**_BETAS, **_V_PREDICTION),
    )


def _x4_upscaler() -> StableDiffusionUpscalePipeline:
    pipe = StableDiffusionUpscalePipeline(
        vae=vae(levels=3, scaling_factor=0.08333),
        unet=unet(in_channels=7, num_class_embeds=1000, only_cross_attention=(True, False)),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", steps_offset=1, **_V_PREDICTION),
        low_res_scheduler=DDPMScheduler(beta_schedule="scaled_linear"),
        **one_text_encoder(),
    )
    return quiet(pipe)


def _sdxl(pipeline: type = StableDiffusionXLPipeline, in_channels: int = 4, **components: Any) -> Any:
    first, first_tokenizer = clip()
    second, second_tokenizer = clip(projection=True, seed=11)
    parts: dict[str, Any] = {
        "unet": _sdxl_unet(in_channels), "vae": vae(), "scheduler": EulerDiscreteScheduler(**_BETAS),
        "text_encoder": first, "tokenizer": first_tokenizer, "text_encoder_2": second,
        "tokenizer_2": second_tokenizer, "add_watermarker": False,
    }  # fmt: skip
    return quiet(pipeline(**(parts | components)))


def _sdxl_unet(in_channels: int = 4) -> UNet2DConditionModel:
    num_time_ids = 6
    return unet(
        in_channels=in_channels, cross_attention_dim=2 * CLIP_WIDTH, use_linear_projection=True,
        transformer_layers_per_block=(1, 2), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), addition_embed_type="text_time",
        addition_time_embed_dim=_TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=num_time_ids * _TIME_ID_WIDTH + CLIP_WIDTH,
    )  # fmt: skip


def _sdxl_inpainting() -> StableDiffusionXLInpaintPipeline:
    return _sdxl(StableDiffusionXLInpaintPipeline, in_channels=9)


def _controlnet_sd15() -> StableDiffusionControlNetPipeline:
    return _sd15(StableDiffusionControlNetPipeline, controlnet=_controlnet(unet()))


def _controlnet_sdxl() -> StableDiffusionXLControlNetPipeline:
    return _sdxl(StableDiffusionXLControlNetPipeline, controlnet=_controlnet(_sdxl_unet()))


def _controlnet(denoiser: UNet2DConditionModel) -> ControlNetModel:
    return random_weights(
        lambda: ControlNetModel.from_unet(denoiser, conditioning_embedding_out_channels=(4, 4, 4, 8)), seed=2
    )


def _sd3() -> StableDiffusion3Pipeline:
    config: dict[str, Any] = {
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 4,
        "num_attention_heads": 2, "attention_head_dim": 4, "caption_projection_dim": 8,
        "joint_attention_dim": T5_WIDTH, "pooled_projection_dim": 2 * CLIP_WIDTH, "pos_embed_max_size": 16,
    }  # fmt: skip
    first, first_tokenizer = clip(projection=True)
    second, second_tokenizer = clip(projection=True, seed=11)
    third, third_tokenizer = t5()
    pipe = StableDiffusion3Pipeline(
        transformer=random_weights(lambda: SD3Transformer2DModel(**config)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=first, tokenizer=first_tokenizer, text_encoder_2=second, tokenizer_2=second_tokenizer,
        text_encoder_3=third, tokenizer_3=third_tokenizer,
    )  # fmt: skip
    return quiet(pipe)


def _side(call: TinyCall) -> int:
    """Pixels of height and width."""
    return 128 if call.large else 64


def _from_text(call: TinyCall) -> dict[str, Any]:
    return {
        "prompt": prompts(call), "num_inference_steps": call.steps, "guidance_scale": 4.0,
        "height": _side(call), "width": _side(call), "generator": call.generator(), "output_type": "latent",
    }  # fmt: skip


def _from_small_picture(call: TinyCall) -> dict[str, Any]:
    """The upscaler takes its size from the picture."""
    arguments = _from_text(call) | {"image": pictures(call, 16 if call.large else 8)}
    return {name: value for name, value in arguments.items() if name not in ("height", "width")}


def _from_masked_picture(call: TinyCall) -> dict[str, Any]:
    side = _side(call)
    mask = Image.new("L", (side, side))
    mask.paste(255, (side // 4, side // 4, side, side))
    return _from_text(call) | {"image": pictures(call, side)[0], "mask_image": mask, "strength": 0.99}


def _from_control_picture(call: TinyCall) -> dict[str, Any]:
    return _from_text(call) | {"image": pictures(call, _side(call))[0]}


def _from_short_text(call: TinyCall) -> dict[str, Any]:
    return _from_text(call) | {"max_sequence_length": 24}


_UNET = ("unet",)
FAMILIES = (
    TinyPipeline("sd15", _sd15, _from_text, _UNET),
    TinyPipeline("sd21", _sd21, _from_text, _UNET),
    TinyPipeline("x4-upscaler", _x4_upscaler, _from_small_picture, _UNET),
    TinyPipeline("sdxl", _sdxl, _from_text, _UNET),
    TinyPipeline("sdxl-inpainting", _sdxl_inpainting, _from_masked_picture, _UNET),
    TinyPipeline("controlnet-sd15", _controlnet_sd15, _from_control_picture, _UNET),
    TinyPipeline("controlnet-sdxl", _controlnet_sdxl, _from_control_picture, _UNET),
    TinyPipeline("sd3", _sd3, _from_short_text),
)
