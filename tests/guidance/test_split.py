"""`guidance="split"` in one process: what each group computes is the denoiser on its part of the batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionInstructPix2PixPipeline
from PIL import Image
from random_pipelines import generate as generate_sd
from random_pipelines import sd
from torch import nn

import asyncdiff
from asyncdiff.errors import ConfigurationError
from asyncdiff.pipeline.denoiser import replaced_forward
from asyncdiff.tiny import TINY_PIPELINES, TinyCall, generate
from asyncdiff.tiny.stable_diffusion import unet

pytestmark = pytest.mark.filterwarnings("ignore::asyncdiff.pipeline.user_warning.AsyncDiffWarning")

IN_ORDER = 99
WHOLE = {
    "sd15": {"timestep"},
    "sdxl": {"timestep"},
    "sd3": set(),
    "controlnet-sd15": {"timestep"},
    "animatediff": {"timestep"},
    "svd": {"timestep"},
    "flux": {"img_ids", "txt_ids"},
}
"""The families that are looked at closely, and the tensor inputs which do not carry the batch, by name."""

TOLERANCE = 2e-5
"""Relative to the largest number of a picture, in float32: products of matrices with half as many rows are
added up in another order, and random weights pass the difference on through four steps. 3e-6 was the most."""


@contextmanager
def run_part_by_part(denoiser: nn.Module, num_parts: int, whole: set[str]) -> Iterator[None]:
    """The untouched forward on every part of the batch, one after the other: an independent oracle."""
    forward = type(denoiser).forward

    def part(value: Any, index: int, name: str = "") -> Any:
        if isinstance(value, dict):
            return {key: part(each, index, key) for key, each in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(part(each, index) for each in value)
        is_cut = isinstance(value, torch.Tensor) and value.ndim > 0 and name not in whole
        return value.chunk(num_parts)[index] if is_cut else value

    def run(*args: Any, **kwargs: Any) -> Any:
        sample = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        if sample.shape[0] % num_parts:
            return forward(denoiser, *args, **kwargs)
        names = ("sample", "timestep", "encoder_hidden_states")
        parts = [
            forward(
                denoiser,
                *(part(arg, index, name) for name, arg in zip(names, args, strict=False)),
                **{name: part(value, index, name) for name, value in kwargs.items()},
            )
            for index in range(num_parts)
        ]
        whole_output = (torch.cat([output[0] for output in parts]),)
        return whole_output if isinstance(parts[0], tuple) else type(parts[0])(*whole_output)

    with replaced_forward(denoiser, run):
        yield


def denoiser_of(family: str, pipe: Any) -> Any:
    return getattr(pipe, TINY_PIPELINES[family].denoisers[0])


@pytest.mark.parametrize(
    ("family", "num_stages"),
    [
        ("sd15", 1), ("sd15", 2), ("sd3", 2), ("flux", 2), ("animatediff", 2),
        *(
            pytest.param(family, num_stages, marks=pytest.mark.wide)
            for family in ("sdxl", "controlnet-sd15", "svd") for num_stages in (1, 2)
        ),
        *(pytest.param(family, 1, marks=pytest.mark.wide) for family in ("sd3", "flux", "animatediff")),
    ],
)  # fmt: skip
def test_in_order_each_group_is_the_denoiser_on_its_part(family: str, num_stages: int) -> None:
    """Bitwise; also for two pictures of one prompt, of which each half has two; and `remove` gives back the
    pipeline as it was."""
    stand_in = TINY_PIPELINES[family]
    pipe = stand_in.build()
    calls = [TinyCall(batch=2), TinyCall(seed=1, batch=2)]
    if family != "flux":  # which is not guided: there the halves are two pictures
        calls[0] = TinyCall()
    alone = [generate(stand_in, pipe, call) for call in calls]
    with run_part_by_part(denoiser_of(family, pipe), 2, WHOLE[family]):
        expected = [generate(stand_in, pipe, call) for call in calls]
    with asyncdiff.parallelize(
        pipe, num_stages=num_stages, guidance="split", warmup_steps=IN_ORDER
    ) as handle:
        made = [generate(stand_in, pipe, call) for call in calls]
        assert handle.plan is not None
        assert (handle.plan.groups, handle.plan.num_stages) == (2, num_stages)
    for one, other, whole in zip(made, expected, alone, strict=True):
        assert torch.equal(one, other)
        assert (one - whole).abs().max() <= TOLERANCE * whole.abs().max()
    assert torch.equal(generate(stand_in, pipe, calls[0]), alone[0])


WAYS: dict[str, dict[str, Any]] = {
    "N2": {"num_stages": 2},
    "N2-linear": {"num_stages": 2, "forecast": "linear"},
    "N3-chain-paper": {"num_stages": 3, "partition": "chain", "forecast": "none"},
    "N2-S2": {"num_stages": 2, "stride": 2, "warmup_steps": 2},
    "N1-S2": {"num_stages": 1, "stride": 2},
    "gate": {"num_stages": 2, "warmup_steps": "auto", "tolerance": 0.05},
}


def ways_and_schedulers() -> Iterator[Any]:
    for (name, options), scheduler in itertools.product(WAYS.items(), (None, EulerDiscreteScheduler)):
        kept = (name, scheduler) in {("N2", None), ("N2-S2", EulerDiscreteScheduler), ("gate", None)}
        kind = "ddim" if scheduler is None else "euler"
        yield pytest.param(options, scheduler, id=f"{name}-{kind}", marks=[] if kept else [pytest.mark.wide])


@pytest.mark.parametrize(("options", "scheduler"), ways_and_schedulers())
def test_each_group_goes_on_from_states_of_its_own(
    options: dict[str, Any], scheduler: Callable[[], Any] | None
) -> None:
    """Two pictures without guidance, one per group, are bitwise what each would be alone: an oracle in which
    nothing is shared. Euler scales its inputs, which a stride has to know of."""
    pipe = sd(scheduler=scheduler() if scheduler else None)

    def make(seeds: list[int]) -> torch.Tensor:
        noise = [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        prompts = [torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(50 + seed)) for seed in seeds]
        return generate_sd(
            pipe, guidance=1.0, latents=torch.cat(noise), prompt_embeds=torch.cat(prompts),
            negative_prompt_embeds=None, steps=9,
        )  # fmt: skip

    with asyncdiff.parallelize(pipe, **options):
        alone = [make([1]), make([2])]
    with asyncdiff.parallelize(pipe, guidance="split", **options):
        assert torch.equal(make([1, 2]), torch.cat(alone))
        assert torch.equal(make([2, 1]), torch.cat(alone[::-1]))


# -- guidance that comes and goes ----------------------------------------------------------------------------


def stop_guidance(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """As diffusers' documentation does it: half the batch from then on."""
    if step != 2:
        return {}
    pipe._guidance_scale = 0.0
    return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[-1]}


@pytest.mark.parametrize("num_stages", [1, 2])
def test_guidance_may_end_in_the_middle_of_a_run(num_stages: int) -> None:
    """From then on the first group works alone, and what it knows of its half is not used."""
    pipe = sd()
    arguments = {
        "callback_on_step_end": stop_guidance, "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
        "steps": 7,
    }  # fmt: skip
    with run_part_by_part(pipe.unet, 2, {"timestep"}):
        expected, guided = generate_sd(pipe, **arguments), generate_sd(pipe, steps=7)
    assert not torch.equal(expected, guided)
    options = {"num_stages": num_stages, "guidance": "split"}
    with asyncdiff.parallelize(pipe, warmup_steps=IN_ORDER, **options):
        assert torch.equal(generate_sd(pipe, **arguments), expected)
        assert torch.equal(generate_sd(pipe, steps=7), guided)
    with asyncdiff.parallelize(pipe, forecast="none", **options) as handle:
        stale = generate_sd(pipe, **arguments)
        assert handle.last_run.steps_in_order == (0, 3), "warm-up again"
        assert torch.equal(stale, expected) == (num_stages == 1)


def test_guidance_may_pause() -> None:
    """Steps of another batch in between: the states of the halves are steps old by then, and not used."""
    pipe = sd()
    untouched = pipe.unet.forward

    def pause(*args: Any, **kwargs: Any) -> Any:
        """The pipeline without guidance in steps 2 and 3."""
        pause.calls += 1  # type: ignore[attr-defined]
        if pause.calls not in (3, 4):  # type: ignore[attr-defined]
            return divided(*args, **kwargs)
        half = {"encoder_hidden_states": kwargs.pop("encoder_hidden_states")[1:], **kwargs}
        return tuple(torch.cat([each] * 2) for each in divided(args[0][1:], *args[1:], **half))

    def make(forward: Callable[..., Any]) -> torch.Tensor:
        nonlocal divided
        divided, pause.calls = forward, 0  # type: ignore[attr-defined]
        with replaced_forward(pipe.unet, pause):
            return generate_sd(pipe, steps=8)

    divided: Callable[..., Any] = untouched
    in_order = make(untouched)
    with asyncdiff.parallelize(pipe, num_stages=2, guidance="split", forecast="none") as handle:
        make(pipe.unet.forward)
        assert handle.last_run.steps_in_order == (0, 2, 4)
    with asyncdiff.parallelize(pipe, num_stages=2, guidance="split", warmup_steps=IN_ORDER):
        made = make(pipe.unet.forward)
        assert (made - in_order).abs().max() <= TOLERANCE * in_order.abs().max()


# -- three-way guidance --------------------------------------------------------------------------------------


def pix2pix() -> StableDiffusionInstructPix2PixPipeline:
    return sd(StableDiffusionInstructPix2PixPipeline, unet=unet(in_channels=8))


def pictures_of(pipe: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randn(1, 5, 8, generator=generator)
    return pipe(
        image=Image.new("RGB", (16, 16), (200, 30, 90)), num_inference_steps=5, output_type="latent",
        prompt_embeds=prompt, negative_prompt_embeds=-prompt, generator=generator,
    ).images  # fmt: skip


@pytest.mark.parametrize("num_stages", [1, 2])
def test_three_way_guidance_takes_three_groups(num_stages: int) -> None:
    pipe = pix2pix()
    with run_part_by_part(pipe.unet, 3, {"timestep"}):
        expected = pictures_of(pipe)
    options = {"devices": 3 * num_stages, "num_stages": num_stages, "runtime": "local", "guidance": "split"}
    with asyncdiff.parallelize(pipe, warmup_steps=IN_ORDER, **options) as handle:
        assert torch.equal(pictures_of(pipe), expected)
        assert handle.plan is not None
        assert handle.plan.groups == 3


def test_three_way_guidance_on_two_groups_is_refused_or_left_together() -> None:
    pipe = pix2pix()
    alone = pictures_of(pipe)
    with (
        asyncdiff.parallelize(pipe, num_stages=1, guidance="split"),
        pytest.raises(
            ConfigurationError, match=r"batch of 3, which cannot be shared between 2 groups.*three"
        ),
    ):
        pictures_of(pipe)
    with asyncdiff.parallelize(pipe, 2, runtime="local", warmup_steps=IN_ORDER) as handle:
        assert torch.equal(pictures_of(pipe), alone)
        assert handle.plan is not None
        assert (handle.plan.groups, handle.plan.num_stages) == (1, 2)


def test_two_halves_on_three_groups_take_two() -> None:
    pipe = sd()
    with run_part_by_part(pipe.unet, 2, {"timestep"}):
        expected = generate_sd(pipe)
    with asyncdiff.parallelize(pipe, 3, runtime="local", guidance="split", warmup_steps=IN_ORDER) as handle:
        assert torch.equal(generate_sd(pipe), expected)
        assert handle.plan is not None
        assert (handle.plan.groups, handle.plan.num_stages) == (3, 1)


# -- what is decided by itself -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("devices", "options", "guidance", "groups"),
    [
        (2, {}, 4.0, 2),
        (4, {}, 4.0, 2),
        (4, {"stride": 2}, 4.0, 2),
        (2, {}, 1.0, 1),
        (3, {}, 4.0, 1),
        (2, {"stride": 2}, 4.0, 1),
        (2, {"num_stages": 2}, 4.0, 1),
        (2, {"partition": "chain"}, 4.0, 1),
        (2, {"guidance": "together"}, 4.0, 1),
    ],
)
def test_auto_splits_where_devices_and_the_first_call_allow(
    devices: int, options: dict[str, Any], guidance: float, groups: int
) -> None:
    pipe = sd()
    with asyncdiff.parallelize(pipe, devices, runtime="local", **options) as handle:
        generate_sd(pipe, guidance=guidance)
        plan = handle.plan
        assert plan is not None
        assert (plan.groups, plan.num_stages) == (groups, devices // groups - options.get("stride", 1) + 1)
        generate_sd(pipe, guidance=4.0 if guidance == 1.0 else 1.0)  # what is decided stays
        assert handle.plan is not None
        assert handle.plan.groups == groups


@pytest.mark.parametrize("family", ["wan-2.1", "z-image"])
def test_auto_leaves_together_what_cannot_be_shared(family: str) -> None:
    """Guidance as two calls; a list of samples."""
    pipe = TINY_PIPELINES[family].build()
    alone = generate(TINY_PIPELINES[family], pipe)
    with asyncdiff.parallelize(pipe, 2, runtime="local", warmup_steps=IN_ORDER) as handle:
        assert torch.equal(generate(TINY_PIPELINES[family], pipe), alone)
        assert handle.plan is not None
        assert handle.plan.groups == 1


def test_settings_made_before_the_first_call_hold_after_the_decision() -> None:
    pipe = sd()
    with asyncdiff.parallelize(pipe, 4, runtime="local") as handle:
        handle.set(warmup_steps=3)
        generate_sd(pipe, steps=9)
        assert handle.last_run.steps_in_order == (0, 1, 2)


def test_a_call_that_cannot_be_shared_is_told_once() -> None:
    pipe = sd()
    with asyncdiff.parallelize(pipe, num_stages=1, guidance="split"):
        with pytest.warns(match="batch of 1, cannot be shared between 2 groups"):
            generate_sd(pipe, guidance=1.0)


def test_plan_for_guidance_as_two_calls_is_that_of_whole_calls() -> None:
    stand_in = TINY_PIPELINES["wan-2.1"]
    pipe, example = stand_in.build(), stand_in.arguments(TinyCall())
    plan = asyncdiff.plan(pipe, ["cpu"] * 4, guidance="split", example=example)
    together = asyncdiff.plan(pipe, ["cpu"] * 2, num_stages=2, example=example)
    assert (plan.groups, plan.stages) == (2, together.stages)
    with asyncdiff.parallelize(pipe, plan=together, runtime="local"):
        expected = generate(stand_in, pipe)
    with asyncdiff.parallelize(pipe, plan=plan, runtime="local"):
        assert torch.equal(generate(stand_in, pipe), expected)
