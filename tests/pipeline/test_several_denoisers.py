"""Pipelines with several denoisers: one handle divides them all, each with its own plan and states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DModel, WanPipeline

import asyncdiff
from asyncdiff.errors import ConfigurationError, ParallelizedError
from asyncdiff.pipeline.denoiser import denoisers_of
from asyncdiff.pipeline.scheduler_lookup import noise_scheduler_of
from asyncdiff.planner import Plan
from asyncdiff.tiny import TINY_PIPELINES, TinyCall, TinyPipeline, generate
from asyncdiff.tiny.parts import quiet

pytestmark = pytest.mark.filterwarnings("ignore::asyncdiff.pipeline.user_warning.AsyncDiffWarning")

WAN, CASCADE = TINY_PIPELINES["wan-2.2"], TINY_PIPELINES["stable-cascade"]
SIX_STEPS = TinyCall(steps=6)
NUM_STEPS_OF_FIRST = 3


def wan_with(pipe: WanPipeline, name: str) -> WanPipeline:
    """A pipeline made of the same components, with this denoiser only: `boundary_ratio` says which timesteps
    the second is for, and 1 is all of them."""
    denoisers = dict.fromkeys(WAN.denoisers) | {name: getattr(pipe, name)}
    boundary_ratio = None if name == "transformer" else 1.0
    return quiet(WanPipeline(**(pipe.components | denoisers), boundary_ratio=boundary_ratio))


def counted_calls(pipe: Any, family: TinyPipeline, call: TinyCall) -> dict[str, int]:
    """How often the untouched pipeline calls each denoiser."""
    counts = dict.fromkeys(family.denoisers, 0)

    def count(name: str) -> Any:
        def hook(*_: Any) -> None:
            counts[name] += 1

        return getattr(pipe, name).register_forward_pre_hook(hook)

    hooks = [count(name) for name in family.denoisers]
    generate(family, pipe, call)
    for hook in hooks:
        hook.remove()
    return counts


def test_second_denoiser_starts_with_warmup() -> None:
    """Three steps each: three warm-up steps are all steps of both, and two are not."""
    pipe = WAN.build()
    alone = generate(WAN, pipe, SIX_STEPS)
    calls = counted_calls(pipe, WAN, SIX_STEPS)
    assert calls == {"transformer": 2 * NUM_STEPS_OF_FIRST, "transformer_2": 6}
    with asyncdiff.parallelize(pipe, num_stages=2, warmup_steps=NUM_STEPS_OF_FIRST) as handle:
        assert torch.equal(generate(WAN, pipe, SIX_STEPS), alone)
        handle.set(warmup_steps=NUM_STEPS_OF_FIRST - 1)
        assert not torch.equal(generate(WAN, pipe, SIX_STEPS), alone)


@pytest.mark.parametrize("stride", [1, 2])
def test_one_handle_is_what_a_handle_for_each_denoiser_is(stride: int) -> None:
    how: dict[str, Any] = {"num_stages": 2, "stride": stride}
    pipe = WAN.build()
    with (
        asyncdiff.parallelize(wan_with(pipe, "transformer"), **how),
        asyncdiff.parallelize(wan_with(pipe, "transformer_2"), **how),
    ):
        expected = generate(WAN, pipe, SIX_STEPS)
    with asyncdiff.parallelize(pipe, **how):
        for _ in range(2):
            assert torch.equal(generate(WAN, pipe, SIX_STEPS), expected)
    assert not torch.equal(generate(WAN, pipe, SIX_STEPS), expected)


def test_last_run_covers_both_denoisers() -> None:
    pipe = WAN.build()
    with asyncdiff.parallelize(pipe, num_stages=2) as handle:
        with pytest.raises(ParallelizedError, match="no run to report"):
            _ = handle.last_run
        for steps in (6, 8):
            generate(WAN, pipe, TinyCall(steps=steps))
            report = handle.last_run
            assert [step.step for step in report.steps] == list(range(steps))
            assert all(step.seconds > 0 and step.devices[0].compute_s > 0 for step in report.steps)
        generate(WAN, wan_with(pipe, "transformer"), TinyCall(steps=5))
        assert len(handle.last_run.steps) == 5  # the other denoiser's last run is not this one


def test_last_run_of_a_prior_and_a_decoder_is_the_decoders() -> None:
    pipe = CASCADE.build()
    with asyncdiff.parallelize(pipe, num_stages=2) as handle:
        generate(CASCADE, pipe, SIX_STEPS)
        assert len(handle.last_run.steps) == 6
        pipe.prior_pipe("a circle", height=128, width=128, num_inference_steps=5)
        assert len(handle.last_run.steps) == 5


@pytest.mark.parametrize("name", WAN.denoisers)
def test_wan_with_one_of_its_denoisers(name: str) -> None:
    pipe = wan_with(WAN.build(), name)
    alone = generate(WAN, pipe, SIX_STEPS)
    with asyncdiff.parallelize(pipe, num_stages=2, warmup_steps=99) as handle:
        assert torch.equal(generate(WAN, pipe, SIX_STEPS), alone)
        assert list(handle.plans) == [name]
        handle.set(warmup_steps=1)
        assert not torch.equal(generate(WAN, pipe, SIX_STEPS), alone)


def test_plans_divide_the_denoisers_so_again() -> None:
    pipe = CASCADE.build()
    with asyncdiff.parallelize(pipe, num_stages=2, warmup_steps=2) as handle:
        assert handle.plans == {"prior": None, "decoder": None}
        expected = generate(CASCADE, pipe, SIX_STEPS)
        plans = handle.plans
    assert plans["prior"] is not None
    assert plans["decoder"] is not None
    assert plans["prior"].stages != plans["decoder"].stages
    again = {name: Plan.from_json(plan.to_json()) for name, plan in plans.items() if plan is not None}
    with asyncdiff.parallelize(pipe, plan=again) as handle:
        assert handle.plans == plans
        assert torch.equal(generate(CASCADE, pipe, SIX_STEPS), expected)


def test_one_plan_is_for_denoisers_of_one_architecture() -> None:
    pipe = WAN.build()
    example = WAN.arguments(TinyCall())
    plan = asyncdiff.plan(pipe, num_stages=2, warmup_steps=2, example=example)
    with asyncdiff.parallelize(pipe, num_stages=2, warmup_steps=2) as handle:
        expected = generate(WAN, pipe, SIX_STEPS)
        assert handle.plans == {"transformer": plan, "transformer_2": plan}
    with asyncdiff.parallelize(pipe, plan=plan) as handle:
        assert torch.equal(generate(WAN, pipe, SIX_STEPS), expected)
        assert handle.plan == plan


def test_one_plan_for_denoisers_of_two_architectures_is_refused() -> None:
    pipe = CASCADE.build()
    with pytest.raises(ConfigurationError, match=r"prior, decoder\. Plan each .*pipe\.prior_pipe"):
        asyncdiff.plan(pipe, num_stages=2, example=CASCADE.arguments(TinyCall()))
    plan = asyncdiff.plan(pipe.decoder_pipe, num_stages=2, example=TINY_PIPELINES[
        "stable-cascade-decoder"
    ].arguments(TinyCall()))  # fmt: skip
    with pytest.raises(ConfigurationError, match=r"plans are for decoder, but .* are prior, decoder"):
        asyncdiff.parallelize(pipe, plan={"decoder": plan})
    three = asyncdiff.plan(
        pipe.prior_pipe, num_stages=3, example={"prompt": "a circle", "height": 128, "width": 128}
    )
    with pytest.raises(ConfigurationError, match="plans of prior, decoder differ"):
        asyncdiff.parallelize(pipe, plan={"prior": three, "decoder": plan})


def test_set_and_remove_reach_every_denoiser() -> None:
    pipe = WAN.build()
    alone = generate(WAN, pipe, SIX_STEPS)
    before = [dict(vars(getattr(pipe, name))) for name in WAN.denoisers]
    attributes = set(vars(pipe))
    handle = asyncdiff.parallelize(pipe, num_stages=2)
    generate(WAN, pipe, SIX_STEPS)
    handle.set(warmup_steps=99)
    assert torch.equal(generate(WAN, pipe, SIX_STEPS), alone)
    for name in WAN.denoisers:
        with pytest.raises(ParallelizedError, match="not possible"):
            getattr(pipe, name).state_dict()
    with pytest.raises(ParallelizedError, match="not possible"):
        pipe.save_pretrained("nowhere")
    handle.remove()
    handle.remove()
    assert [dict(vars(getattr(pipe, name))) for name in WAN.denoisers] == before
    assert set(vars(pipe)) <= attributes | {"_guidance_scale_2"}
    assert torch.equal(generate(WAN, pipe, SIX_STEPS), alone)


def test_one_that_is_parallelized_already_is_refused_and_the_other_left_alone() -> None:
    pipe = WAN.build()
    with asyncdiff.parallelize(wan_with(pipe, "transformer_2"), num_stages=2):
        before = dict(vars(pipe.transformer))
        with pytest.raises(ConfigurationError, match="already parallelized"):
            asyncdiff.parallelize(pipe, num_stages=2)
        assert vars(pipe.transformer) == before


def test_lora_for_each_denoiser_reaches_it() -> None:
    """Loaded by the pipeline while both are divided."""
    pipe = WAN.build()
    width = pipe.transformer.blocks[0].attn1.to_q.in_features
    parts = torch.randn(4, 2, width, generator=torch.Generator().manual_seed(5))
    names = [f"transformer.blocks.1.attn1.to_q.lora_{part}.weight" for part in "AB"]
    first = dict(zip(names, (parts[0], parts[1].T.contiguous()), strict=True))
    second = dict(zip(names, (parts[2], parts[3].T.contiguous()), strict=True))

    def load(pipe: Any) -> None:
        pipe.load_lora_weights(dict(first), adapter_name="style")
        pipe.load_lora_weights(dict(second), adapter_name="style_2", load_into_transformer_2=True)

    with_lora = WAN.build()
    load(with_lora)
    expected = generate(WAN, with_lora, SIX_STEPS)
    with asyncdiff.parallelize(pipe, num_stages=2, warmup_steps=99):
        assert not torch.equal(generate(WAN, pipe, SIX_STEPS), expected)
        load(pipe)
        assert torch.equal(generate(WAN, pipe, SIX_STEPS), expected)


class ThirdPartyPipeline:
    """Not one of diffusers: its `decoder` is that of an autoencoder, its `prior` a distribution."""

    def __init__(self, **parts: Any) -> None:
        self.components = parts
        for name, part in parts.items():
            setattr(self, name, part)


def autoencoder() -> AutoencoderKL:
    return AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)


def test_decoder_of_an_autoencoder_is_no_denoiser() -> None:
    unet = UNet2DModel(
        block_out_channels=(4,), norm_num_groups=2, down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",), attention_head_dim=2,
    )  # fmt: skip
    pipe = ThirdPartyPipeline(decoder=autoencoder().decoder, prior=torch.nn.Linear(1, 1), unet=unet)
    assert denoisers_of(pipe) == {"unet": unet}
    assert denoisers_of(ThirdPartyPipeline(decoder=unet)) == {"decoder": unet}


@pytest.mark.parametrize(
    ("pipe", "message"),
    [
        (
            ThirdPartyPipeline(vae=autoencoder(), decoder=autoencoder().decoder, scheduler=None),
            "ThirdPartyPipeline has no denoiser: looked for unet, transformer, transformer_2, prior and "
            "decoder, but it has vae, decoder.",
        ),
        ("a model id", "str has no denoiser: .*, but it is no diffusers pipeline."),
    ],
    ids=["pipeline", "string"],
)
def test_refusal_says_what_was_looked_for(pipe: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        asyncdiff.parallelize(pipe, num_stages=2)


def test_denoiser_may_have_a_noise_scheduler_of_its_own() -> None:
    """unCLIP's `prior_scheduler` drives its prior: not the `scheduler` beside it, which is for another."""
    pipe = CASCADE.build()
    assert noise_scheduler_of(pipe, "prior") is pipe.prior_scheduler
    assert noise_scheduler_of(pipe, "decoder") is pipe.scheduler
    assert noise_scheduler_of(pipe.prior_pipe, "prior") is pipe.prior_scheduler
