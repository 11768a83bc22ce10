"""What cannot be combined with a divided denoiser is refused, with the reason and the way out.

Both when it is there before `parallelize` and when it is switched on afterwards; and a refusal leaves the
pipeline as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import apply_first_block_cache, apply_group_offloading
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

import asyncdiff
from asyncdiff.errors import AsyncDiffError, ConfigurationError, ParallelizedError
from asyncdiff.tiny import TINY_PIPELINES, TinyCall, generate

pytestmark = pytest.mark.filterwarnings("ignore::asyncdiff.pipeline.user_warning.AsyncDiffWarning")

SD = TINY_PIPELINES["sd15"]
FLUX = TINY_PIPELINES["flux"]
CPU = torch.device("cpu")


def denoiser_of(pipe: Any) -> Any:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def broadcast_attention(pipe: Any) -> None:
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: pipe._current_timestep
    )
    pipe.transformer.enable_cache(config)


def faster_cache(pipe: Any) -> None:
    pipe.transformer.enable_cache(
        FasterCacheConfig(current_timestep_callback=lambda: 500, is_guidance_distilled=True)
    )


def set_parallel_config(pipe: Any) -> None:
    """As `enable_parallelism` leaves it, which needs as many accelerators as processes."""
    denoiser_of(pipe)._parallel_config = object()


def wrap(pipe: Any) -> None:
    pipe.unet = nn.DataParallel(pipe.unet)


def compile_whole(pipe: Any) -> None:
    denoiser_of(pipe).compile(backend="eager")


def replace_by_compiled(pipe: Any) -> None:
    pipe.unet = torch.compile(pipe.unet, backend="eager")


def quantise_to_int8(pipe: Any) -> None:
    """By bitsandbytes where it is installed, else by layers of that name: only it is looked at."""
    module = pipe.transformer.transformer_blocks[0].attn
    try:
        from bitsandbytes.nn import Linear8bitLt
    except ImportError:
        Linear8bitLt = type("Linear8bitLt", (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
    module.to_q = Linear8bitLt(module.to_q.in_features, module.to_q.out_features)


# What is switched on, of which pipeline, and what the refusal says when it was there before.
BEFORE = {
    "group-offload": (SD, lambda p: p.unet.enable_group_offload(CPU, offload_type="leaf_level"),
                      "under CPU or group offloading.*Load the pipeline without"),
    "pipeline-group-offload": (SD, lambda p: p.enable_group_offload(CPU, offload_type="leaf_level"),
                               "under CPU or group offloading"),
    "group-offload-of-blocks": (
        SD, lambda p: apply_group_offloading(p.unet, CPU, offload_type="block_level", num_blocks_per_group=1),
        "under CPU or group offloading"),
    "cpu-offload": (SD, lambda p: cpu_offload(p.unet, CPU), "under CPU or group offloading"),
    "device-map": (SD, lambda p: setattr(p, "hf_device_map", {"unet": "cpu"}), "loaded with a device_map"),
    "first-block-cache": (FLUX, lambda p: p.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.2)),
                          r"cache enabled \(FBC.*disable_cache\(\) first"),
    "first-block-cache-function": (
        FLUX, lambda p: apply_first_block_cache(p.transformer, FirstBlockCacheConfig(threshold=0.2)),
        r"cache enabled \(FBC"),
    "taylor-cache": (FLUX, lambda p: p.transformer.enable_cache(TaylorSeerCacheConfig()),
                     r"cache enabled \(TaylorSeer"),
    "attention-broadcast": (FLUX, broadcast_attention, r"cache enabled \(PyramidAttention"),
    "faster-cache": (FLUX, faster_cache, r"cache enabled \(FasterCache"),
    "parallelism": (FLUX, set_parallel_config, "in another way already.*do without asyncdiff"),
    "data-parallel": (SD, wrap, r"wrapped in DataParallel.*its \.module"),
    "int8": (FLUX, quantise_to_int8, r"attn\.to_q has bitsandbytes' int8 weights.*load_in_4bit=True"),
    "compiled": (SD, compile_whole, r"compiled as a whole.*compile_repeated_blocks\(\)"),
    "compiled-copy": (SD, replace_by_compiled, r"compiled as a whole.*compile_repeated_blocks\(\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", BEFORE)
def test_what_is_there_before_is_refused(name: str) -> None:
    family, switch_on, message = BEFORE[name]
    pipe = family.build()
    switch_on(pipe)
    before = dict(vars(denoiser_of(pipe)))
    with pytest.raises(ConfigurationError, match=message) as refusal:
        asyncdiff.parallelize(pipe, num_stages=2)
    assert "\n" not in str(refusal.value)
    assert vars(denoiser_of(pipe)) == before


# Methods, and what the refusal says when they are called while the denoiser is divided.
AFTER: dict[str, tuple[Any, Callable[[Any], Any], str]] = {
    "model-offload": (SD, lambda p: p.enable_model_cpu_offload(device="cpu"), "already holds only"),
    "sequential-offload": (SD, lambda p: p.enable_sequential_cpu_offload(device="cpu"), "already holds only"),
    "pipeline-group-offload": (SD, lambda p: p.enable_group_offload(CPU), "already holds only"),
    "group-offload": (SD, lambda p: p.unet.enable_group_offload(CPU), "already holds only"),
    "cache": (FLUX, lambda p: p.transformer.enable_cache(FirstBlockCacheConfig()), "skips blocks"),
    "parallelism": (FLUX, lambda p: p.transformer.enable_parallelism(config=None), "two ways of dividing"),
    "layerwise-casting": (SD, lambda p: p.unet.enable_layerwise_casting(torch.bfloat16), "casts the weights"),
    "compile": (SD, lambda p: p.unet.compile(), r"compile_repeated_blocks\(\)"),
    "device": (SD, lambda p: p.to("meta"), "it stays on cpu"),
    "dtype": (SD, lambda p: p.unet.half(), "only a part of the weights"),
    "saving": (SD, lambda p: p.save_pretrained("anywhere"), "only a part of the weights"),
}  # fmt: skip


@pytest.mark.parametrize("name", AFTER)
def test_what_is_switched_on_afterwards_is_refused(name: str) -> None:
    family, switch_on, message = AFTER[name]
    pipe = family.build()
    before = dict(vars(denoiser_of(pipe)))
    with asyncdiff.parallelize(pipe, num_stages=2):
        with pytest.raises(ParallelizedError, match=message) as refusal:
            switch_on(pipe)
        assert "handle.remove()" in str(refusal.value)
        assert "\n" not in str(refusal.value)
    assert vars(denoiser_of(pipe)) == before


# Functions that no method guards: the next run notices.
PAST_THE_GUARDS: dict[str, tuple[Any, Callable[[Any], Any], str]] = {
    "cache": (FLUX, lambda p: apply_first_block_cache(p.transformer, FirstBlockCacheConfig()), "has a cache"),
    "group-offload": (
        SD, lambda p: apply_group_offloading(p.unet, CPU, offload_type="leaf_level"), "offloading"
    ),
    "cpu-offload": (SD, lambda p: add_hook_to_module(p.unet, AlignDevicesHook(CPU)), "offloading"),
    "compiled-copy": (SD, replace_by_compiled, "compiled as a whole"),
}  # fmt: skip


def lora_of(pipe: Any) -> dict[str, torch.Tensor]:
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    width = pipe.unet.get_submodule(layer).in_features
    return {
        f"unet.{layer}.lora_A.weight": torch.randn(2, width),
        f"unet.{layer}.lora_B.weight": torch.randn(width, 2),
    }


@pytest.mark.parametrize("name", PAST_THE_GUARDS)
def test_what_gets_past_the_guards_is_refused_by_the_next_run(name: str) -> None:
    family, switch_on, message = PAST_THE_GUARDS[name]
    pipe = family.build()
    handle = asyncdiff.parallelize(pipe, num_stages=2)
    generate(family, pipe)
    switch_on(pipe)
    with pytest.raises(AsyncDiffError, match=message):
        generate(family, pipe)
    handle.remove()


def test_adapters_unfused_by_another_pipeline_are_refused() -> None:
    """It has the denoiser but not its guards, and most of the fused weights are elsewhere."""
    pipe = SD.build()
    pipe.unet.load_lora_adapter(lora_of(pipe), prefix="unet")
    pipe.fuse_lora(components=["unet"])
    with asyncdiff.parallelize(pipe, num_stages=2, warmup_steps=99):
        generate(SD, pipe)
        for module in pipe.unet.modules():
            if isinstance(module, BaseTunerLayer):
                module.unmerge()
        with pytest.raises(ParallelizedError, match=r"weights were changed.*handle\.remove\(\) first"):
            generate(SD, pipe)


@pytest.mark.wide
def test_refusals_hold_with_processes_too() -> None:
    pipe = SD.build()
    call = TinyCall()
    exact = generate(SD, pipe, call)
    with asyncdiff.parallelize(pipe, 2, num_stages=2, warmup_steps=99):
        generate(SD, pipe, call)
        for family, switch_on, message in AFTER.values():
            if family is SD:
                with pytest.raises(ParallelizedError, match=message):
                    switch_on(pipe)
        assert torch.equal(generate(SD, pipe, call), exact)
    assert torch.equal(generate(SD, pipe, call), exact)
