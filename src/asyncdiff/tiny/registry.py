"""All stand-ins by name. A file of families exports `FAMILIES`; nothing is built before it is asked for."""

from __future__ import annotations

from typing import Any

from asyncdiff.errors import ConfigurationError
from asyncdiff.tiny import (
    flux,
    image_transformers,
    omnigen,
    qwen_image,
    stable_diffusion,
    unets,
    video_transformers,
    video_unets,
)
from asyncdiff.tiny.stand_in import TinyCall, TinyPipeline, generate

__all__ = ["TINY_PIPELINES", "TinyCall", "TinyPipeline", "generate", "tiny_pipeline"]

_MODULES = (
    flux,
    image_transformers,
    omnigen,
    qwen_image,
    stable_diffusion,
    unets,
    video_transformers,
    video_unets,
)

TINY_PIPELINES: dict[str, TinyPipeline] = {
    family.name: family for module in _MODULES for family in module.FAMILIES
}


def tiny_pipeline(name: str) -> Any:
    """The pipeline of a family, built; `ConfigurationError` listing the known names."""
    if name not in TINY_PIPELINES:
        raise ConfigurationError(
            f"There is no tiny pipeline {name!r}. Use one of {', '.join(sorted(TINY_PIPELINES))}."
        )
    return TINY_PIPELINES[name].build()
