"""Real architectures are the published ones, and those of the step's benchmark run."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from asyncdiff.bench.architectures import (
    ARCHITECTURES,
    DenoisingLoop,
    architecture_named,
    build_denoiser,
)
from asyncdiff.bench.architectures.hidream import deal_out_tokens
from asyncdiff.errors import ConfigurationError
from asyncdiff.pipeline.denoiser import capture_call
from asyncdiff.pipeline.examination import examine
from asyncdiff.tiny import TINY_PIPELINES, TinyCall
from asyncdiff.trace import flatten_inputs

# Of the published checkpoints: to the parameter, or in billions as their cards and the hub round them. A
# table of positions that is a buffer (sd3's) is not counted.
PUBLISHED = {
    "sd15": 859_520_964, "sd21": 865_910_724, "x4-upscaler": 0.473, "sdxl": 2_567_463_684,
    "sdxl-inpainting": 2_567_463_684 + 5 * 320 * 9, "controlnet-sd15": 859_520_964,
    "controlnet-sdxl": 2_567_463_684, "sd3": 2_028_328_000, "svd": 1.52, "animatediff": 0.8595 + 0.417,
    "sd35": 8.06, "flux": 11.9, "flux2": 32.2, "pixart-sigma": 0.61, "sana": 1.60, "hunyuan-dit": 1.5,
    "qwen-image": 20.4, "z-image": 6.15, "lumina2": 2.61, "aura-flow": 6.83, "chroma": 8.9, "cogview4": 6.37,
    "hidream": 17.1,
    "omnigen": 3.76, "wan-2.1": 14.3, "wan-2.2": 14.3, "wan-2.2-5b": 5.0, "ltx": 1.92, "hunyuan-video": 12.8,
    "cogvideox": 5.57, "mochi": 10.03, "latte": 1.06, "kandinsky-3": 3.06, "stable-cascade-prior": 3.59,
    "stable-cascade-decoder": 1.56, "i2vgen-xl": 1.42, "text-to-video": 1.41,
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_architecture_has_the_published_number_of_parameters(name: str) -> None:
    denoiser = build_denoiser(ARCHITECTURES[name], torch.float32, weightless=True)
    published = PUBLISHED[name]
    if isinstance(published, int):
        assert denoiser.num_parameters() == published
    else:
        assert denoiser.num_parameters() / 1e9 == pytest.approx(published, rel=0.01)


def test_hidream_costs_what_it_costs_where_values_choose_the_experts() -> None:
    family = TINY_PIPELINES["hidream"]
    pipe = family.build()
    args, kwargs = capture_call(pipe, [pipe.transformer], family.arguments(TinyCall()))
    inputs = flatten_inputs(type(pipe.transformer).forward, args, kwargs)
    chosen = examine(pipe.transformer, inputs, weights_at_hand=True)
    assert chosen.recording.mode in ("hollow", "real")
    deal_out_tokens(pipe.transformer)
    dealt_out = examine(pipe.transformer, inputs, weights_at_hand=False)
    assert dealt_out.recording.mode in ("fake", "mixed")
    assert dealt_out.recording.work[0][0] == chosen.recording.work[0][0] > 0


def test_unknown_architecture_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match=r"--arch sd9 is not known. Use one of demo, .*sd15, "):
        architecture_named("sd9")


def test_architecture_whose_loop_is_not_a_simple_one_is_not_timed() -> None:
    with pytest.raises(ConfigurationError, match=r"--arch wan-2\.2 is not known"):
        architecture_named("wan-2.2")


TIMED = sorted(name for name, each in ARCHITECTURES.items() if each.noise_scheduler is not None)


def fill(denoiser: torch.nn.Module, mode: FakeTensorMode) -> None:
    """Fake tensors on the CPU for those on the meta device, also for what modules keep as attributes."""
    for module in denoiser.modules():
        for held in (module._parameters, module._buffers, vars(module)):
            for name, tensor in held.items():
                if isinstance(tensor, torch.Tensor):
                    with mode:
                        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
                    held[name] = torch.nn.Parameter(fake) if held is module._parameters else fake


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.wide) for name in TIMED] + ["demo"])
def test_loop_denoises(name: str) -> None:
    """All inputs fit the denoiser, and its prediction the latents. On fake weights: nothing is computed."""
    architecture = architecture_named(name)
    denoiser = build_denoiser(architecture, torch.bfloat16, weightless=True)
    fill(denoiser, FakeTensorMode(allow_non_fake_inputs=True))
    loop = DenoisingLoop(architecture, denoiser, 256, torch.bfloat16)
    steps: list[int] = []
    latents = loop(1, steps.append)
    noise = list(loop._latents.shape)
    noise[architecture.channel_dim] -= architecture.picture_channels
    assert list(latents.shape) == noise
    assert steps == [0]
