"""All stand-ins by name. A file of families exports `FAMILIES`; nothing is built before it is asked for, nor
imported: the pipelines of all families together take seconds."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from asyncdiff.errors import ConfigurationError
from asyncdiff.tiny.stand_in import TinyCall, TinyPipeline, generate

__all__ = ["TINY_PIPELINES", "TinyCall", "TinyPipeline", "generate", "tiny_pipeline"]

_NAMES_BY_MODULE = {
    "flux": ("flux", "flux-true-cfg", "flux-kontext", "flux-controlnet", "flux2", "chroma"),
    "image_transformers": (
        "sd35", "sd35-skip-layers", "pixart-alpha", "pixart-sigma", "sana", "hunyuan-dit", "aura-flow",
        "cogview4", "lumina2", "z-image", "hidream",
    ),
    "omnigen": ("omnigen",),
    "qwen_image": ("qwen-image", "qwen-image-edit"),
    "stable_diffusion": (
        "sd15", "sd21", "x4-upscaler", "sdxl", "sdxl-inpainting", "controlnet-sd15", "controlnet-sdxl", "sd3",
    ),
    "unets": (
        "kandinsky-3", "stable-cascade-prior", "stable-cascade-decoder", "stable-cascade", "text-to-video",
        "i2vgen-xl", "unconditional-ddpm", "unconditional-ddim", "stable-audio",
    ),
    "video_transformers": (
        "wan-2.1", "wan-2.2", "wan-2.2-5b", "wan-image-to-video", "ltx", "hunyuan-video",
        "hunyuan-video-true-cfg", "cogvideox", "mochi", "latte",
    ),
    "video_unets": ("svd", "animatediff"),
}  # fmt: skip


class _Families(Mapping[str, TinyPipeline]):
    """By name; looking one up imports the file it is in."""

    def __init__(self, names_by_module: Mapping[str, tuple[str, ...]]) -> None:
        self._modules = {name: module for module, names in names_by_module.items() for name in names}

    def __getitem__(self, name: str) -> TinyPipeline:
        module = importlib.import_module(f"asyncdiff.tiny.{self._modules[name]}")
        return next(family for family in module.FAMILIES if family.name == name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


TINY_PIPELINES: Mapping[str, TinyPipeline] = _Families(_NAMES_BY_MODULE)


def tiny_pipeline(name: str) -> Any:
    """The pipeline of a family, built; `ConfigurationError` listing the known names."""
    if name not in TINY_PIPELINES:
        raise ConfigurationError(
            f"There is no tiny pipeline {name!r}. Use one of {', '.join(sorted(TINY_PIPELINES))}."
        )
    return TINY_PIPELINES[name].build()
