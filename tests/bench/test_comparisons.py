"""diffusers' own ways to be faster really are on while they are measured, and off afterwards."""

from __future__ import annotations

import pickle
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from asyncdiff.bench.architectures import (
    ARCHITECTURES,
    Architecture,
    DenoisingLoop,
    architecture_named,
    build_denoiser,
)
from asyncdiff.bench.architectures.architecture import packed_image, text, vector, video
from asyncdiff.bench.comparisons import Comparison, ComparisonRun, comparisons_for

STEPS = 14
_FLOW = "FlowMatchEulerDiscreteScheduler"
_FLUX: dict[str, Any] = {
    "patch_size": 1, "in_channels": 16, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": 8,
}  # fmt: skip


def ids(num_axes: int, *, batched: bool) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Positions of the picture's and the text's tokens."""
    outer = (1,) if batched else ()
    return {
        "img_ids": lambda latents: torch.zeros(*outer, latents.shape[1], num_axes),
        "txt_ids": lambda latents: torch.zeros(*outer, 6, num_axes),
    }


FLUX = Architecture(
    "flux", "tiny FLUX.1", "FluxTransformer2DModel", packed_image(16),
    text(6, 8, pooled_projections=vector(8), guidance=vector(), **ids(3, batched=False)),
    _FLUX | {
        "axes_dims_rope": (4, 4, 8), "num_layers": 3, "num_single_layers": 4, "pooled_projection_dim": 8,
        "guidance_embeds": True,
    },
    noise_scheduler=_FLOW, timestep_divisor=1000,
)  # fmt: skip
FLUX2 = Architecture(
    "flux2", "tiny FLUX.2", "Flux2Transformer2DModel", packed_image(16),
    text(6, 8, guidance=vector(), **ids(4, batched=True)),
    _FLUX | {
        "axes_dims_rope": (4, 4, 4, 4), "num_layers": 2, "num_single_layers": 4,
        "timestep_guidance_channels": 8,
    },
    noise_scheduler=_FLOW, timestep_divisor=1000,
)  # fmt: skip
WAN = Architecture(
    "wan", "tiny Wan, guidance in one call", "WanTransformer3DModel", video(4, 3), text(5, 8),
    {
        "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
        "text_dim": 8, "freq_dim": 16, "ffn_dim": 32, "num_layers": 3, "rope_max_seq_len": 32,
    },
    batch=2, noise_scheduler=_FLOW,
)  # fmt: skip
COGVIDEOX = Architecture(
    "cogvideox", "tiny CogVideoX", "CogVideoXTransformer3DModel", video(4, 3, frames_first=True), text(5, 8),
    {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4,
        "time_embed_dim": 8, "text_embed_dim": 8, "num_layers": 3, "sample_width": 8, "sample_height": 8,
        "sample_frames": 9, "max_text_seq_length": 5,
    },
    batch=2, noise_scheduler=_FLOW, channel_dim=2,
)  # fmt: skip


def loop_of(architecture: Architecture) -> DenoisingLoop:
    return DenoisingLoop(architecture, build_denoiser(architecture, torch.float32), 64, torch.float32)


def row(loop: DenoisingLoop, name: str, devices: tuple[str, ...] = ("cpu", "cpu")) -> Comparison:
    [found] = [each for each in comparisons_for(loop, devices) if each.name == name]
    return found


def attributes(denoiser: nn.Module) -> list[dict[str, Any]]:
    """What every module holds, by identity."""
    return [{name: id(value) for name, value in vars(module).items()} for module in denoiser.modules()]


def count_calls(module: nn.Module) -> list[object]:
    """Grows by one with every call."""
    calls: list[object] = []
    module.register_forward_hook(lambda *ignored: calls.append(None))
    return calls


CACHED = [
    (FLUX, "first-block cache"),
    (FLUX, "TaylorSeer"),
    (FLUX, "FasterCache"),
    (FLUX, "Pyramid Attention Broadcast"),
    (FLUX, "MagCache"),
    (WAN, "first-block cache"),
    (WAN, "FasterCache"),
    (WAN, "SeaCache"),
    (COGVIDEOX, "FasterCache"),
]


@pytest.mark.parametrize(
    ("architecture", "name"), CACHED, ids=[f"{name}-{architecture.name}" for architecture, name in CACHED]
)
def test_cache_is_on_during_the_measurement_and_off_after_it(architecture: Architecture, name: str) -> None:
    loop = loop_of(architecture)
    in_order = loop(STEPS)
    before = attributes(loop.denoiser)
    run = row(loop, name).measure(STEPS)
    assert run.not_available is None
    assert len(run.seconds_per_step) == STEPS
    assert 0 < sum(run.seconds_per_step) <= run.seconds
    assert run.relative_error is not None
    assert 0 < run.relative_error < 1
    assert attributes(loop.denoiser) == before
    assert torch.equal(loop(STEPS), in_order)


def test_cache_leaves_out_what_its_documentation_says() -> None:
    """TaylorSeer, interval 5 after 10 full steps: of 14 steps all compute attention but 10, 12 and 13."""
    loop = loop_of(FLUX)
    calls = count_calls(loop.denoiser.transformer_blocks[1].attn.to_q)
    comparison = row(loop, "TaylorSeer")
    assert comparison.measure(STEPS).relative_error is not None
    assert len(calls) == 2 + 11 + STEPS  # untimed, cached, in order


def test_runs_do_not_see_each_others_cache() -> None:
    comparison = row(loop_of(FLUX), "FasterCache")
    assert comparison.measure(STEPS).relative_error == comparison.measure(STEPS).relative_error


def test_cache_that_never_skips_is_exact() -> None:
    assert row(loop_of(FLUX), "TaylorSeer").measure(4).relative_error == 0


def test_threads_are_those_of_a_device() -> None:
    loop = loop_of(FLUX)
    threads: set[int] = set()
    loop.denoiser.register_forward_hook(lambda *ignored: threads.add(torch.get_num_threads()))
    torch.set_num_threads(2)
    row(loop, "MagCache").measure(4)
    assert threads == {1}
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("architecture", "name", "reason"),
    [
        (FLUX2, "first-block cache", r"^fails on Flux2Transformer2DModel: TypeError: "),
        (FLUX2, "MagCache", r"magnitudes measured for the checkpoint"),
        (FLUX, "SeaCache", r"in Wan's and Cosmos 3's latents only"),
        (WAN, "TaylorSeer", r"^finds nothing to cache in diffusers' WanTransformer3DModel$"),
        (replace(FLUX, batch=2), "FasterCache", r"latents that are packed"),
    ],
    ids=[
        "outputs of another shape",
        "no magnitudes",
        "no adapter",
        "no block of that name",
        "packed guidance",
    ],
)
def test_cache_that_cannot_be_had_says_why(architecture: Architecture, name: str, reason: str) -> None:
    loop = loop_of(architecture)
    in_order = loop(2)
    before = attributes(loop.denoiser)
    run = row(loop, name).measure(4)
    assert run.not_available is not None
    assert re.search(reason, run.not_available)
    assert attributes(loop.denoiser) == before
    assert torch.equal(loop(2), in_order)


def test_nothing_is_to_be_had_for_a_unet() -> None:
    loop = loop_of(architecture_named("demo"))
    runs = [comparison.measure(4) for comparison in comparisons_for(loop, ["cpu", "cpu"])]
    assert {run.not_available for run in runs} == {
        "diffusers' UNet2DConditionModel cannot cache (it is no CacheMixin)",
        "diffusers' UNet2DConditionModel has no plan for it (_cp_plan)",
    }
    assert all(run.seconds_per_step == [] and run.relative_error is None for run in runs)


@pytest.mark.parametrize(
    ("name", "devices", "reason"),
    [
        ("ulysses", ("cpu",), "two devices or more"),
        ("ring", ("cpu", "cpu"), "log-sum-exp"),
        ("ulysses", ("cpu", "cuda:0"), "not cpu, cuda"),
        ("ulysses", ("cuda:0", "cuda:0"), "a CUDA device for every process"),
    ],
)
def test_devices_that_context_parallelism_cannot_use(
    name: str, devices: tuple[str, ...], reason: str
) -> None:
    run = row(loop_of(FLUX), f"context parallelism, {name}", devices).measure(4)
    assert run.not_available is not None
    assert reason in run.not_available


def test_rows_say_what_they_use() -> None:
    rows = comparisons_for(loop_of(FLUX), ["cpu"] * 3)
    assert {comparison.name: comparison.devices for comparison in rows} == {
        "context parallelism, ulysses": 3,
        "context parallelism, ring": 3,
        "first-block cache": 1,
        "TaylorSeer": 1,
        "FasterCache": 1,
        "Pyramid Attention Broadcast": 1,
        "MagCache": 1,
        "SeaCache": 1,
    }
    assert rows[0].settings == "ulysses_degree 3"


@pytest.mark.parametrize("architecture", [FLUX, WAN], ids=lambda each: each.name)
def test_another_process_builds_the_same_loop(architecture: Architecture) -> None:
    loop = loop_of(architecture)
    sent = pickle.loads(pickle.dumps(loop.own_architecture()))
    again = DenoisingLoop(sent, build_denoiser(sent, torch.float32), 0, torch.float32)
    assert torch.equal(again(3), loop(3))


def test_every_loop_can_be_sent_to_another_process() -> None:
    timed = [each for each in ARCHITECTURES.values() if each.noise_scheduler is not None]
    for architecture in timed:
        loop = DenoisingLoop(architecture, nn.Identity(), 64, torch.bfloat16)
        sent = pickle.loads(pickle.dumps(loop.own_architecture()))
        assert sent.config == architecture.config


def measure_context_parallel(architecture: Architecture, devices: tuple[str, ...]) -> ComparisonRun:
    loop = loop_of(architecture)
    in_order = loop(5)
    run = row(loop, "context parallelism, ulysses", devices).measure(5)
    assert torch.equal(loop(5), in_order)
    return run


@pytest.mark.wide
@pytest.mark.timeout(300)
@pytest.mark.parametrize("architecture", [FLUX, FLUX2, WAN], ids=lambda each: each.name)
def test_context_parallelism_on_cpus_computes_the_same(architecture: Architecture) -> None:
    """The same sums over other pieces: 6e-8 was seen; 0 for Wan, of whose tokens each rank had half."""
    run = measure_context_parallel(architecture, ("cpu", "cpu"))
    assert run.not_available is None
    assert run.relative_error is not None
    assert run.relative_error < 1e-6
    assert len(run.seconds_per_step) == 5
    assert min(run.seconds_per_step) > 0


@pytest.mark.wide
@pytest.mark.timeout(300)
def test_ranks_that_fail_end_and_say_why() -> None:
    """16 tokens for three devices."""
    run = measure_context_parallel(FLUX, ("cpu",) * 3)
    assert run.not_available is not None
    assert run.not_available.startswith("fails on FluxTransformer2DModel: AssertionError: Tensor size along")


@pytest.mark.wide
def test_interrupt_ends_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """`conftest.py` fails a test that leaves a process behind."""
    communicate = subprocess.Popen.communicate

    def interrupted(process: Any, *args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(subprocess.Popen, "communicate", communicate)
        deadline = time.monotonic() + 60
        while len(psutil.Process(process.pid).children()) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        row(loop_of(FLUX), "context parallelism, ulysses").measure(5)


@pytest.mark.gpu
def test_cache_on_a_gpu_leaves_the_loop_where_it_was() -> None:
    loop = loop_of(FLUX)
    in_order = loop(STEPS)
    run = row(loop, "TaylorSeer", ("cuda:0",)).measure(STEPS)
    assert run.relative_error is not None
    assert 0 < run.relative_error < 1
    assert torch.equal(loop(STEPS), in_order)


@pytest.mark.gpu(2)
@pytest.mark.wide
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["ulysses", "ring"])
def test_context_parallelism_on_gpus_computes_the_same(name: str) -> None:
    """bfloat16, which cuDNN's attention wants: eight bits, and differences grow over the steps."""
    denoiser = build_denoiser(FLUX, torch.bfloat16)
    loop = DenoisingLoop(FLUX, denoiser, 64, torch.bfloat16)
    run = row(loop, f"context parallelism, {name}", ("cuda:0", "cuda:1")).measure(5)
    assert run.not_available is None
    assert run.relative_error is not None
    assert run.relative_error < 0.05
