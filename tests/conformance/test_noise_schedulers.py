"""What holds with every noise scheduler: in order nothing changes, and asynchronous steps follow
docs/method.md, bitwise, against the independent implementation in `method_reference`.

Second-order noise schedulers evaluate the denoiser twice per step, each evaluation a place in their
timesteps; PNDM lists a timestep twice; Euler, EDM and relatives scale the denoiser's input by a factor of the
step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers
import pytest
import torch
from method_reference import Reference, input_scales, read_in_time

import asyncdiff
from asyncdiff.tiny import TINY_PIPELINES, TinyCall, TinyPipeline, generate
from asyncdiff.tiny.noise_schedulers import SCHEDULER_CASES, SchedulerCase

pytestmark = [
    pytest.mark.filterwarnings("ignore::asyncdiff.pipeline.user_warning.AsyncDiffWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),
]

IN_ORDER = 99
STEPS = 6
W = 2


ALSO_STRIDE_1 = (
    "PNDMScheduler",
    "KDPM2DiscreteScheduler",
    "EDMEulerScheduler",
    "FlowMatchHeunDiscreteScheduler",
)


def first_of_each(cases: tuple[SchedulerCase, ...]) -> list[SchedulerCase]:
    """One case for each noise scheduler and family."""
    return list({(case.scheduler, case.family): case for case in reversed(cases)}.values())


FIRST = first_of_each(SCHEDULER_CASES)


def _id(case: SchedulerCase) -> str:
    return f"{case.family}: {case.name}"


def _cases_by_stride() -> list[Any]:
    """Every case with stride 1 and 2; what of it is too much for every day is marked `wide`."""
    params = []
    for case in SCHEDULER_CASES:
        for stride in (1, 2):
            daily = case in FIRST and (stride == 2 or case.scheduler in ALSO_STRIDE_1)
            marks = [] if daily else [pytest.mark.wide]
            params.append(pytest.param(case, stride, id=f"{_id(case)}, stride {stride}", marks=marks))
    return params


def latents_of(
    stand_in: TinyPipeline, pipe: Any, arguments: Mapping[str, Any] | None = None, **call: Any
) -> torch.Tensor:
    """One generation; noise schedulers that ignore the generator find the same global numbers."""
    torch.manual_seed(0)
    latents = generate(stand_in, pipe, TinyCall(**{"steps": STEPS, **call}), **(arguments or {}))
    assert latents.isfinite().all(), "the comparison would say nothing"
    return latents


def by_reference(
    stand_in: TinyPipeline,
    pipe: Any,
    stages: list[list[str]],
    arguments: Mapping[str, Any] | None = None,
    **settings: Any,
) -> torch.Tensor:
    (denoiser,) = (getattr(pipe, name) for name in stand_in.denoisers)
    vars(denoiser)["forward"] = Reference(denoiser, pipe.scheduler, stages, **settings)
    try:
        return latents_of(stand_in, pipe, arguments)
    finally:
        del vars(denoiser)["forward"]


def check(
    stand_in: TinyPipeline,
    pipe: Any,
    arguments: Mapping[str, Any] | None = None,
    *,
    stride: int,
    time_shift: bool = False,
    num_stages: int = 2,
    leads: tuple[int, ...] | None = None,
    **reference: Any,
) -> None:
    """In order the untouched pipeline, asynchronous the reference, and not the same by chance. `leads`: of
    stages that work ahead on latents that are continued; then not bit for bit, as sums are made in another
    order."""
    alone = latents_of(stand_in, pipe, arguments)
    split = {
        "num_stages": num_stages, "stride": stride, "time_shift": time_shift, "partition": "chain",
        "forecast": "latents" if leads else "linear",
    }  # fmt: skip
    with asyncdiff.parallelize(pipe, warmup_steps=IN_ORDER, **split) as handle:
        assert torch.equal(latents_of(stand_in, pipe, arguments), alone)
        handle.set(warmup_steps=W)
        stale = latents_of(stand_in, pipe, arguments)
        stages = [list(names) for names in handle.plan.stages]
        fresh = read_in_time(handle.plan)
    assert not torch.equal(stale, alone)
    settings = {"S": stride, "w": W, "time_shift": time_shift, "fresh": fresh, "leads": leads, **reference}
    expected = by_reference(stand_in, pipe, stages, arguments, **settings)
    if leads:
        torch.testing.assert_close(stale, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().mean()))
    else:
        assert torch.equal(stale, expected)


@pytest.mark.parametrize("stride", [1, pytest.param(2, marks=pytest.mark.wide)])
@pytest.mark.parametrize("case", FIRST, ids=_id)
def test_continued_latents_follow_the_method(case: SchedulerCase, stride: int) -> None:
    check(case.stand_in, case.build(), case.arguments, stride=stride, leads=(1, 0))


@pytest.mark.parametrize(("case", "stride"), _cases_by_stride())
def test_noise_scheduler_follows_the_method(case: SchedulerCase, stride: int) -> None:
    check(case.stand_in, case.build(), case.arguments, stride=stride)


@pytest.mark.wide
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("case", FIRST, ids=_id)
def test_time_shift_with_noise_scheduler_follows_the_method(case: SchedulerCase, stride: int) -> None:
    check(case.stand_in, case.build(), case.arguments, stride=stride, time_shift=True)


@pytest.mark.parametrize(("name", "stride"), [("EulerDiscreteScheduler", 2), ("HeunDiscreteScheduler", 1)])
def test_time_shift_follows_the_method(name: str, stride: int) -> None:
    case = SchedulerCase(name)
    check(case.stand_in, case.build(), stride=stride, time_shift=True)


SLICED = [
    "DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "LCMScheduler",
    "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "DPMSolverSDEScheduler", "UniPCMultistepScheduler",
]  # fmt: skip
FEW_SLICED = ("PNDMScheduler", "EulerDiscreteScheduler", "KDPM2DiscreteScheduler")


def image_to_image(pipe: Any) -> TinyPipeline:
    """The same components, from a picture."""
    flow = isinstance(pipe, diffusers.StableDiffusion3Pipeline)
    kind = diffusers.StableDiffusion3Img2ImgPipeline if flow else diffusers.StableDiffusionImg2ImgPipeline
    components = pipe.components | ({} if flow else {"requires_safety_checker": False})
    components.pop("image_encoder", None)
    stand_in = TINY_PIPELINES["sd3" if flow else "sd15"]
    side = 64

    def build() -> Any:
        sliced = kind(**components)
        sliced.set_progress_bar_config(disable=True)
        return sliced

    def arguments(call: TinyCall) -> dict[str, Any]:
        picture = torch.linspace(0, 1, 3 * side * side).reshape(1, 3, side, side)
        given = stand_in.arguments(call) | {"image": picture}
        return {name: value for name, value in given.items() if name not in ("height", "width")}

    return TinyPipeline("image to image", build, arguments, stand_in.denoisers)


@pytest.mark.parametrize("left_out", [1, 2])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in FEW_SLICED else pytest.mark.wide) for n in SLICED]
)
def test_slice_of_the_timesteps_follows_the_method(name: str, left_out: int) -> None:
    """Image to image leaves out the first steps; PNDM's slice may begin at the second of two equal ones."""
    options = {"noise_sampler_seed": 0} if name == "DPMSolverSDEScheduler" else {}
    stand_in = image_to_image(SchedulerCase(name, options).build())
    pipe = stand_in.build()
    steps = 8
    arguments = {"num_inference_steps": steps, "strength": 1 - left_out / steps}
    begin = left_out * pipe.scheduler.order
    check(stand_in, pipe, arguments, stride=2, begin=begin)


def test_slice_of_flow_matching_timesteps_follows_the_method() -> None:
    stand_in = image_to_image(TINY_PIPELINES["sd3"].build())
    check(stand_in, stand_in.build(), {"num_inference_steps": 8, "strength": 0.75}, stride=2, begin=2)


@pytest.mark.parametrize(
    ("family", "channel_dim", "arguments", "begin"),
    [("sdxl-inpainting", 1, {"strength": 1.0}, 0), ("svd", 2, {}, 0)],
)
def test_only_the_latents_are_scaled(
    family: str, channel_dim: int, arguments: dict[str, Any], begin: int
) -> None:
    """A mask or a picture that is concatenated to them, in whichever dim, is the same at every step."""
    stand_in = TINY_PIPELINES[family]
    pipe = stand_in.build()
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    check(stand_in, pipe, arguments, stride=2, begin=begin, num_scaled=4, channel_dim=channel_dim)


class _Halving(diffusers.DDIMScheduler):
    """Scales by a factor of its own."""

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        return sample / (1 + timestep / 1000)


def test_scale_of_a_noise_scheduler_that_nobody_knows_is_used() -> None:
    stand_in = TINY_PIPELINES["sd15"]
    pipe = stand_in.build()
    pipe.scheduler = _Halving.from_config(pipe.scheduler.config, clip_sample=False)
    check(stand_in, pipe, stride=2)


LIFE = ("EulerDiscreteScheduler", "PNDMScheduler", "KDPM2DiscreteScheduler", "UniPCMultistepScheduler")


@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.wide), 2])
def test_noise_scheduler_is_replaced_and_the_number_of_steps_changes(stride: int) -> None:
    """One handle for all of it: what was learned of one noise scheduler is not used for the next."""
    stand_in = TINY_PIPELINES["sd15"]
    pipe = stand_in.build()
    config = pipe.scheduler.config
    schedulers = [getattr(diffusers, name).from_config(config) for name in LIFE]
    runs = [(scheduler, steps) for scheduler in schedulers for steps in (6, 9)] + [(schedulers[0], 6)]
    split = {"num_stages": 2, "stride": stride, "warmup_steps": W, "partition": "chain", "forecast": "linear"}
    with asyncdiff.parallelize(pipe, **split) as handle:
        latents = []
        for pipe.scheduler, steps in runs:
            latents.append(latents_of(stand_in, pipe, steps=steps))
        stages = [list(names) for names in handle.plan.stages]
    assert torch.equal(latents[0], latents[-1])
    for (pipe.scheduler, steps), stale in zip(runs, latents, strict=True):
        given = {"num_inference_steps": steps}
        fresh = read_in_time(handle.plan)
        expected = by_reference(stand_in, pipe, stages, given, S=stride, w=W, fresh=fresh)
        assert torch.equal(stale, expected)


@pytest.mark.wide
@pytest.mark.parametrize(
    "case",
    [
        SchedulerCase("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
        SchedulerCase("KDPM2DiscreteScheduler"),
        SchedulerCase("PNDMScheduler"),
        SchedulerCase("FlowMatchHeunDiscreteScheduler", family="sd3"),
        SchedulerCase("EulerDiscreteScheduler", family="svd"),
    ],
    ids=_id,
)
def test_processes_are_bitwise_the_local_executor(case: SchedulerCase) -> None:
    pipe = case.build()
    with asyncdiff.parallelize(pipe, num_stages=2, stride=2, time_shift=True):
        expected = latents_of(case.stand_in, pipe)
    with asyncdiff.parallelize(pipe, devices=["cpu"] * 3, num_stages=2, stride=2, time_shift=True):
        assert torch.equal(latents_of(case.stand_in, pipe), expected)


def test_reference_knows_scales_that_matter() -> None:
    """The cases above would say little if no factor differed from 1, or if the factors were the same."""
    for name in ("EulerDiscreteScheduler", "KDPM2DiscreteScheduler", "EDMEulerScheduler"):
        pipe = SchedulerCase(name).build()
        pipe.scheduler.set_timesteps(STEPS)
        factors = input_scales(pipe.scheduler, 0)
        assert len(set(factors)) >= STEPS
