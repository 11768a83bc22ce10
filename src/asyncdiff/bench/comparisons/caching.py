"""diffusers' caches: on one device, what an earlier step computed is used again.

With the settings of diffusers' documentation (guide "Caching"). Its cache of text keys and values is left
out: it is made for NucleusMoE, which has no loop here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn

from asyncdiff.bench.architectures import DenoisingLoop
from asyncdiff.bench.comparisons.comparison import Comparison, InOrder, NotAvailableError, on_one_device
from asyncdiff.bench.timed_run import StepEnds, TimedRun

_UNTIMED_STEPS = 2

# What diffusers raises for blocks that it does not know and outputs that it did not expect.
_REFUSALS = (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError)

_Configure: TypeAlias = Callable[[DenoisingLoop, int], Any]
"""From the loop and the number of steps to diffusers' configuration of a cache."""


def comparisons(loop: DenoisingLoop, device: str, threads: int | None, in_order: InOrder) -> list[Comparison]:
    """All of them, also those that this denoiser cannot have."""
    return [
        Comparison(name, 1, settings, partial(_generate, loop, device, threads, configure), in_order)
        for name, settings, configure in (
            ("first-block cache", "threshold 0.2", _first_block),
            ("TaylorSeer", "interval 5, order 1, from step 10", _taylor_seer),
            ("FasterCache", "attention every 2nd step below timestep 681", _faster),
            ("Pyramid Attention Broadcast", "attention every 2nd step, timesteps 100 to 800", _pyramid),
            ("MagCache", "threshold 0.06, at most 3 in a row", _magnitude),
            ("SeaCache", "threshold 0.2, at most 2 in a row", _spectral),
        )
    ]


def _first_block(loop: DenoisingLoop, steps: int) -> Any:
    from diffusers import FirstBlockCacheConfig

    return FirstBlockCacheConfig(threshold=0.2)


def _taylor_seer(loop: DenoisingLoop, steps: int) -> Any:
    from diffusers import TaylorSeerCacheConfig

    return TaylorSeerCacheConfig(
        cache_interval=5, max_order=1, disable_cache_before_step=10, taylor_factors_dtype=torch.bfloat16
    )


def _faster(loop: DenoisingLoop, steps: int) -> Any:
    """With guidance as one call of both halves, the unconditional one is left out too."""
    from diffusers import FasterCacheConfig

    return FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 681),
        attention_weight_callback=lambda _: 0.3,
        unconditional_batch_skip_range=5,
        unconditional_batch_timestep_skip_range=(-1, 781),
        current_timestep_callback=lambda: loop.current_timestep,
        **_guidance(loop),
    )


def _guidance(loop: DenoisingLoop) -> dict[str, Any]:
    architecture = loop.own_architecture()
    if architecture.batch == 1:
        return {"is_guidance_distilled": True}
    num_dims = len(architecture.latent_shape(0, 0))
    if num_dims == 2:
        raise NotAvailableError("does not know how guidance's halves lie in latents that are packed")
    if num_dims == 3:
        return {"tensor_format": "BCHW"}
    return {"tensor_format": "BCFHW" if architecture.channel_dim == 1 else "BFCHW"}


def _pyramid(loop: DenoisingLoop, steps: int) -> Any:
    from diffusers import PyramidAttentionBroadcastConfig

    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 800),
        current_timestep_callback=lambda: loop.current_timestep,
    )


def _magnitude(loop: DenoisingLoop, steps: int) -> Any:
    from diffusers import FluxTransformer2DModel, MagCacheConfig
    from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS

    if not isinstance(loop.denoiser, FluxTransformer2DModel):
        raise NotAvailableError("needs magnitudes measured for the checkpoint; diffusers has FLUX.1's only")
    return MagCacheConfig(mag_ratios=FLUX_MAG_RATIOS, num_inference_steps=steps)


def _spectral(loop: DenoisingLoop, steps: int) -> Any:
    from diffusers import SeaCacheConfig, WanTransformer3DModel

    # Without an adapter it computes everything, and warns.
    if not isinstance(loop.denoiser, WanTransformer3DModel):
        raise NotAvailableError("diffusers can find the picture for it in Wan's and Cosmos 3's latents only")
    return SeaCacheConfig(threshold=0.2, max_consecutive_cached=2)


def _generate(
    loop: DenoisingLoop, device: str, threads: int | None, configure: _Configure, steps: int
) -> tuple[TimedRun, torch.Tensor]:
    kind = type(loop.denoiser).__name__
    if not hasattr(loop.denoiser, "enable_cache"):
        raise NotAvailableError(f"diffusers' {kind} cannot cache (it is no CacheMixin)")
    try:
        with on_one_device(loop, device, threads):
            with _cached(loop.denoiser, configure(loop, _UNTIMED_STEPS)):
                loop(_UNTIMED_STEPS)
            with _cached(loop.denoiser, configure(loop, steps)):
                ends = StepEnds(loop.device)
                latents = loop(steps, lambda step: ends.mark())
                return ends.finish(), latents
    except _REFUSALS as error:
        reason = str(error).partition("\n")[0]
        raise NotAvailableError(f"fails on {kind}: {type(error).__name__}: {reason}") from error


@contextmanager
def _cached(denoiser: nn.Module, config: Any) -> Iterator[None]:
    """The denoiser with this cache, empty; afterwards as it was.

    Not by `disable_cache`: that leaves a `forward` and a registry of hooks with every module, and takes out
    nothing where `enable_cache` stopped half-way.
    """
    before = {module: dict(vars(module)) for module in denoiser.modules()}
    try:
        for module in before:
            vars(module).pop("_diffusers_hook", None)
        denoiser.enable_cache(config)  # type: ignore[operator]
        if not any(_is_hooked(module) for module in before if module is not denoiser):
            raise NotAvailableError(f"finds nothing to cache in diffusers' {type(denoiser).__name__}")
        yield
    finally:
        for module, attributes in before.items():
            vars(module).clear()
            vars(module).update(attributes)


def _is_hooked(module: nn.Module) -> bool:
    registry = getattr(module, "_diffusers_hook", None)
    return registry is not None and bool(registry.hooks)
