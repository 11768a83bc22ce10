"""Stand-ins that the package does not have, with a ControlNet of the denoiser's configuration, and ways to
call a ControlNet that pipelines have."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    HunyuanDiT2DControlNetModel,
    HunyuanDiTControlNetPipeline,
    QwenImageControlNetModel,
    QwenImageControlNetPipeline,
    SanaControlNetModel,
    SanaControlNetPipeline,
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
)
from diffusers.models import MultiControlNetModel

from asyncdiff.tiny import TINY_PIPELINES, TinyCall
from asyncdiff.tiny.parts import quiet, random_weights
from asyncdiff.tiny.text import pictures


@dataclass(frozen=True)
class Family:
    """`build`: a pipeline with a ControlNet; `arguments`: of a call."""

    build: Callable[[], Any]
    arguments: Callable[[TinyCall], dict[str, Any]]

    def generate(self, pipe: Any, *, steps: int = 5, **changes: Any) -> torch.Tensor:
        of_call = {name: changes.pop(name) for name in ("seed", "large") if name in changes}
        arguments = self.arguments(TinyCall(steps=steps, **of_call)) | changes
        with torch.random.fork_rng():
            torch.manual_seed(0)  # some pipelines draw the control picture's latents from it
            made = pipe(**arguments, return_dict=False)[0]
        assert type(made) is torch.Tensor
        return made


def of_package(name: str) -> Family:
    return Family(TINY_PIPELINES[name].build, TINY_PIPELINES[name].arguments)


def _with(name: str, pipeline: type, make: Callable[[Any], Any], **picture: Any) -> Family:
    """A family of the package with the ControlNet that `make` makes of its pipeline."""

    def build() -> Any:
        pipe = TINY_PIPELINES[name].build()
        controlnet = random_weights(lambda: make(pipe), seed=2)
        return quiet(pipeline(**(pipe.components | picture.get("parts", {})), controlnet=controlnet))

    def arguments(call: TinyCall) -> dict[str, Any]:
        given = TINY_PIPELINES[name].arguments(call)
        side = given["height"]
        return given | {"control_image": call.randn(1, 3, side, side).clamp(0, 1)}

    return Family(build, arguments)


def _like(kind: Any, denoiser: Any, **changes: Any) -> Any:
    """A ControlNet with the configuration of a denoiser, as far as it has one."""
    names = inspect.signature(kind.__init__).parameters
    return kind(**({name: value for name, value in denoiser.config.items() if name in names} | changes))


def _deep_autoencoder() -> AutoencoderDC:
    levels = 6
    config: dict[str, Any] = {"latent_channels": 4, "attention_head_dim": 2}
    for side in ("encoder", "decoder"):
        config |= {
            f"{side}_block_out_channels": (4,) * levels, f"{side}_layers_per_block": (1,) * levels,
            f"{side}_block_types": "ResBlock", f"{side}_qkv_multiscales": ((),) * levels,
        }  # fmt: skip
    return random_weights(lambda: AutoencoderDC(**config), seed=1)


def _two_controlnets() -> Any:
    pipe = TINY_PIPELINES["controlnet-sd15"].build()
    second = random_weights(lambda: type(pipe.controlnet).from_config(pipe.controlnet.config), seed=5)
    pipe.controlnet = MultiControlNetModel([pipe.controlnet, second])
    return pipe


def _for_two(call: TinyCall) -> dict[str, Any]:
    given = TINY_PIPELINES["controlnet-sd15"].arguments(call)
    return given | {
        "image": [given["image"], given["image"].rotate(90)], "controlnet_conditioning_scale": [0.8, 0.5],
    }  # fmt: skip


def _img2img() -> Any:
    pipe = TINY_PIPELINES["controlnet-sd15"].build()
    return quiet(StableDiffusionControlNetImg2ImgPipeline(**pipe.components, requires_safety_checker=False))


def _from_picture(call: TinyCall) -> dict[str, Any]:
    given = TINY_PIPELINES["controlnet-sd15"].arguments(call)
    return given | {
        "control_image": given["image"], "image": pictures(call, given["height"])[0], "strength": 0.8,
    }  # fmt: skip


FAMILIES = {
    "sd15": of_package("controlnet-sd15"),
    "sdxl": of_package("controlnet-sdxl"),
    "flux": of_package("flux-controlnet"),
    "sd35": _with(
        "sd35",
        StableDiffusion3ControlNetPipeline,
        lambda pipe: SD3ControlNetModel.from_transformer(
            pipe.transformer, num_layers=3, num_extra_conditioning_channels=0
        ),
    ),
    "qwen-image": _with(
        "qwen-image",
        QwenImageControlNetPipeline,
        lambda pipe: QwenImageControlNetModel.from_transformer(
            pipe.transformer, num_layers=2, attention_head_dim=16, num_attention_heads=2
        ),
    ),
    "sana": _with(
        "sana",
        SanaControlNetPipeline,
        lambda pipe: _like(SanaControlNetModel, pipe.transformer, num_layers=2),
        parts={"vae": _deep_autoencoder()},
    ),
    "hunyuan-dit": _with(
        "hunyuan-dit",
        HunyuanDiTControlNetPipeline,
        lambda pipe: _like(HunyuanDiT2DControlNetModel, pipe.transformer, transformer_num_layers=6),
    ),
    "two": Family(_two_controlnets, _for_two),
    "img2img": Family(_img2img, _from_picture),
}
