"""Real denoiser architectures without their weights: what a measurement of speed, and a table of cut points
at real sizes, need without a download.
"""

from __future__ import annotations

import json
from dataclasses import replace

from asyncdiff.bench.architectures import hidream, image_transformers, other_unets, stable_diffusion
from asyncdiff.bench.architectures import video as video_transformers
from asyncdiff.bench.architectures.architecture import (
    Architecture,
    build_controlnet,
    build_denoiser,
    image,
    text,
)
from asyncdiff.bench.architectures.loop import DenoisingLoop
from asyncdiff.demo import DEMO_MODEL
from asyncdiff.errors import ConfigurationError

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "DenoisingLoop",
    "architecture_named",
    "build_controlnet",
    "build_denoiser",
]

ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for family in (
        stable_diffusion.ARCHITECTURES,
        stable_diffusion.LATER,
        image_transformers.ARCHITECTURES,
        hidream.ARCHITECTURES,
        video_transformers.ARCHITECTURES,
        other_unets.ARCHITECTURES,
    )
    for architecture in family
}


def architecture_named(name: str) -> Architecture:
    """The architecture, if its denoiser can be timed in a loop of its own; `ConfigurationError` listing those
    that can. `demo`: the bundled pipeline's U-Net, `controlnet-demo`: with a ControlNet."""
    if name == "demo":
        return _demo_architecture()
    if name == "controlnet-demo":
        return replace(_demo_architecture(), name=name, controlnet_class="ControlNetModel")
    timed = [each.name for each in ARCHITECTURES.values() if each.noise_scheduler is not None]
    if name not in timed:
        known = ", ".join(["demo", *sorted(["controlnet-demo", *timed])])
        raise ConfigurationError(f"--arch {name} is not known. Use one of {known}.")
    return ARCHITECTURES[name]


def _demo_architecture() -> Architecture:
    config = json.loads((DEMO_MODEL / "unet" / "config.json").read_text(encoding="utf-8"))
    picture = json.loads((DEMO_MODEL / "vae" / "config.json").read_text(encoding="utf-8"))["sample_size"]
    return Architecture(
        name="demo",
        title="the bundled pipeline",
        class_name="UNet2DConditionModel",
        latent_shape=image(config["in_channels"], picture // config["sample_size"]),
        conditions=text(16, config["cross_attention_dim"]),
        config={key: value for key, value in config.items() if not key.startswith("_")},
        height=picture,
        width=picture,
        batch=2,
        component="unet",
        noise_scheduler="DDIMScheduler",
        latents_name="sample",
    )
