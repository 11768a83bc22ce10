"""Looking ahead: the timestep argument and the input scale of later steps, against real noise schedulers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    KDPM2DiscreteScheduler,
)

from asyncdiff.errors import ConfigurationError
from asyncdiff.pipeline.noise_scheduler import new_tracker, watch
from asyncdiff.pipeline.timesteps import (
    TimestepMap,
    input_scale,
    other_step_names,
    scaled_part,
    timestep_name,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def flow_timesteps(num_steps: int = 20) -> torch.Tensor:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(num_steps)
    return scheduler.timesteps


def ddim_timesteps(num_steps: int = 20) -> torch.Tensor:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(num_steps)
    return scheduler.timesteps


# What pipelines of diffusers 0.42 pass, written as they write it.
ARGUMENTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "stable diffusion": lambda t: t,
    "stable diffusion 3": lambda t: t.expand(2),
    "flux": lambda t: t.expand(2).to(torch.bfloat16) / 1000,
    "flux, float16": lambda t: t.expand(2).to(torch.float16) / 1000,
    "flux, float32": lambda t: t.expand(2).to(torch.float32) / 1000,
    "krea 2": lambda t: (t / 1000).expand(2).to(torch.bfloat16),
    "aura flow": lambda t: torch.tensor([t / 1000]).expand(2).to(dtype=torch.bfloat16),
    "prx": lambda t: (t.float() / 1000).view(1).repeat(2),
    "lumina 2": lambda t: (1 - t / 1000).expand(2),
    "z-image": lambda t: (1000 - t.expand(2)) / 1000,
    "ideogram": lambda t: (1.0 - t.float() / 1000).expand(2).to(torch.bfloat16),
    "glm image": lambda t: t.expand(2) - 1,
    "sana": lambda t: t.expand(2) * 0.001,
    "hunyuan video": lambda t: t.expand(2).to(torch.bfloat16),
    "easy animate": lambda t: torch.tensor([t] * 2).to(dtype=torch.float16),
    "long": lambda t: t.expand(2).to(torch.int64),
    "anyflow": lambda t: t.expand(2).unsqueeze(-1).repeat((1, 3)),
}


@pytest.mark.parametrize("timesteps", [flow_timesteps(), ddim_timesteps()], ids=["flow", "ddim"])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_learned_argument_is_bitwise_the_pipelines(name: str, timesteps: torch.Tensor) -> None:
    """Never wrong: after any number of observations a later argument is the pipeline's, or not known."""
    argument, known = ARGUMENTS[name], 0
    timestep_map = TimestepMap(scales=(0.001,))
    for observed in range(8):
        timestep_map.observe(timesteps[observed], argument(timesteps[observed]))
        for t in timesteps[observed + 1 :]:
            predicted = timestep_map.argument_for(t, like=argument(timesteps[observed]))
            if predicted is not None:
                known += 1
                assert isinstance(predicted, torch.Tensor)
                true = argument(t)
                assert predicted.dtype == true.dtype
                assert predicted.shape == true.shape
                assert torch.equal(predicted, true)
    assert known > 0


@pytest.mark.parametrize("name", ["stable diffusion", "stable diffusion 3", "flux, float32", "hunyuan video"])
def test_one_observation_is_enough_where_the_forms_agree(name: str) -> None:
    timesteps, argument = flow_timesteps(), ARGUMENTS[name]
    timestep_map = TimestepMap()
    timestep_map.observe(timesteps[0], argument(timesteps[0]))
    for t in timesteps[1:]:
        predicted = timestep_map.argument_for(t, like=argument(timesteps[0]))
        assert isinstance(predicted, torch.Tensor)
        assert torch.equal(predicted, argument(t))


def test_order_of_cast_and_division_is_told_apart_by_a_second_observation() -> None:
    """t = 1000 gives 1.0 either way; later timesteps differ in the last bit of bfloat16."""
    timesteps, argument = flow_timesteps(), ARGUMENTS["flux"]
    assert any(not torch.equal(argument(t), ARGUMENTS["krea 2"](t)) for t in timesteps)
    timestep_map = TimestepMap()
    timestep_map.observe(timesteps[0], argument(timesteps[0]))
    unknown = [t for t in timesteps[1:] if timestep_map.argument_for(t, like=argument(t)) is None]
    assert unknown
    timestep_map.observe(unknown[0], argument(unknown[0]))
    assert all(timestep_map.argument_for(t, like=argument(t)) is not None for t in unknown)


def test_nothing_is_known_before_the_first_observation() -> None:
    assert TimestepMap().argument_for(torch.tensor(3), like=torch.tensor(3)) is None
    assert not TimestepMap().is_refuted
    assert TimestepMap().names == ()


@pytest.mark.parametrize(
    "argument",
    [
        lambda t: torch.sin(t / 1000) / (torch.cos(t / 1000) + torch.sin(t / 1000)),  # Sana-Sprint
        lambda t: torch.stack([t, torch.zeros_like(t)]),  # image to video: a timestep per token
        lambda t: torch.zeros(1),
        lambda t: torch.zeros(0),
    ],
)
def test_other_arguments_are_refused(argument: Callable[[torch.Tensor], torch.Tensor]) -> None:
    timestep_map = TimestepMap()
    for t in flow_timesteps()[:3]:
        timestep_map.observe(t, argument(t))
    assert timestep_map.is_refuted
    with pytest.raises(ConfigurationError, match=r"stride > 1 needs .* Use stride=1"):
        timestep_map.argument_for(torch.tensor(500.0), like=torch.zeros(1))


@pytest.mark.parametrize(
    "like",
    [
        torch.tensor(961),
        torch.tensor([961]).expand(2),
        torch.tensor([961, 961]),
        torch.tensor([961.0]).bfloat16().expand(3, 4),
        torch.full((4, 3), 961.0).T,
    ],
)
def test_tensors_come_back_as_they_would_be_passed(like: torch.Tensor) -> None:
    """Also in memory: a worker that was told of the wrong layout has computed in vain."""
    timestep_map = TimestepMap()
    timestep_map.observe(torch.tensor(961), like)
    found = timestep_map.argument_for(torch.tensor(480), like=like)
    assert isinstance(found, torch.Tensor)
    assert (found.dtype, found.shape, found.stride()) == (like.dtype, like.shape, like.stride())
    assert torch.equal(found, torch.full_like(like, 480))


def test_numbers_come_back_as_numbers() -> None:
    timestep_map = TimestepMap()
    timestep_map.observe(torch.tensor(981), 981)
    assert timestep_map.argument_for(torch.tensor(961), like=981) == 961
    assert isinstance(timestep_map.argument_for(torch.tensor(961), like=981), int)
    floats = TimestepMap()
    floats.observe(750.0, 0.75)
    assert floats.argument_for(500.0, like=0.75) == 0.5


def test_number_of_training_timesteps_is_that_of_the_noise_scheduler() -> None:
    timestep_map = TimestepMap(num_train_timesteps=500)
    timestep_map.observe(torch.tensor(400.0), torch.tensor([0.8]))
    argument = timestep_map.argument_for(torch.tensor(125.0), like=torch.tensor([0.8]))
    assert isinstance(argument, torch.Tensor)
    assert argument.tolist() == [0.25]


def test_result_is_a_new_tensor() -> None:
    """Denoisers may calculate in place."""
    timestep_map, like = TimestepMap(), torch.tensor(981).repeat(4)
    timestep_map.observe(torch.tensor(981), like)
    argument = timestep_map.argument_for(torch.tensor(961), like=like)
    assert isinstance(argument, torch.Tensor)
    argument += 1
    assert argument.tolist() == [962] * 4
    assert like.tolist() == [981] * 4


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("sample", "timestep", "encoder_hidden_states"), "timestep"),
        (("hidden_states", "timesteps", "encoder_hidden_states_t5"), "timesteps"),
        (("sample", "timestep_ratio"), "timestep_ratio"),
        (("x", "t", "cap_feats"), "t"),
        (("input_ids", "encoder_hidden_states"), None),
        (("sample", "timestep", "timestep_cond"), "timestep"),
    ],
)
def test_timestep_input_is_found_by_name(names: tuple[str, ...], expected: str | None) -> None:
    assert timestep_name(names) == expected


def test_second_timestep_is_named() -> None:
    """`timestep_cond` (the guidance scale's embedding) is constant and no second timestep."""
    assert other_step_names(("hidden_states", "timestep", "timestep_r", "timestep_cond")) == ("timestep_r",)
    assert other_step_names(("sample", "timestep")) == ()


SCALING = [
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverSDEScheduler",
    "EDMEulerScheduler",
    "EDMDPMSolverMultistepScheduler",
]


def make(name: str) -> Any:
    if name == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")
    if name in ("LMSDiscreteScheduler", "DPMSolverSDEScheduler"):
        pytest.importorskip("scipy")
    return getattr(diffusers, name)()


def true_scales(scheduler: Any, t_start: int) -> dict[int, float]:
    """By what the pipeline's own loop multiplies its latents, by position in `scheduler.timesteps`."""
    begin = t_start * scheduler.order
    if t_start:
        scheduler.set_begin_index(begin)
    latents, scales = torch.ones(1, 2, 2, 2), {}
    for index, t in enumerate(scheduler.timesteps[begin:], begin):
        scales[index] = float(scheduler.scale_model_input(torch.ones(1, dtype=torch.float64), t))
        scaled = scheduler.scale_model_input(latents, t)
        latents = scheduler.step(0.1 * scaled, t, latents, return_dict=False)[0]
    return scales


@pytest.mark.parametrize("t_start", [0, 2])
@pytest.mark.parametrize("name", SCALING)
def test_input_scale_ahead_is_the_one_the_loop_applies(name: str, t_start: int) -> None:
    scheduler = make(name)
    scheduler.set_timesteps(6)
    ahead = {index: input_scale(scheduler, index) for index in range(len(scheduler.timesteps))}
    true = true_scales(scheduler, t_start)
    assert {index: ahead[index] for index in true} == true


@pytest.mark.parametrize("name", SCALING)
def test_input_scale_does_not_disturb_a_run(name: str) -> None:
    plain, asked = make(name), make(name)
    if name == "DPMSolverSDEScheduler":
        plain, asked = (
            type(scheduler).from_config(scheduler.config, noise_sampler_seed=0)
            for scheduler in (plain, asked)
        )
    outputs = []
    for scheduler in (plain, asked):
        torch.manual_seed(0)
        scheduler.set_timesteps(5)
        x, out = torch.linspace(-1, 1, 16).reshape(1, 1, 4, 4), []
        for t in scheduler.timesteps:
            if scheduler is asked:
                for index in range(-1, len(scheduler.timesteps) + 1):
                    before = copy.copy(scheduler.__dict__)
                    input_scale(scheduler, index)
                    assert all(scheduler.__dict__[key] is value for key, value in before.items())
            scaled = scheduler.scale_model_input(x, t)
            x = scheduler.step(0.1 * scaled, t, x, return_dict=False)[0]
            out.append(x)
        outputs.append(out)
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler", "LCMScheduler"]
)
def test_input_scale_is_1_where_the_input_is_not_scaled(name: str) -> None:
    scheduler = make(name)
    scheduler.set_timesteps(4)
    assert [input_scale(scheduler, index) for index in range(4)] == [1.0] * 4


def test_input_scale_without_the_method_is_1() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    assert input_scale(scheduler, 2) == 1.0


def test_latents_are_what_the_input_begins_with() -> None:
    latents, others = torch.rand(2, 4, 3, 3), torch.rand(2, 5, 3, 3)
    assert scaled_part(latents, [torch.rand(1, 4, 3, 3), latents]) == (0, 2)
    assert scaled_part(latents.clone(), [latents]) == (0, 2)
    assert scaled_part(latents.half(), [latents]) == (0, 2)
    assert scaled_part(torch.cat([latents, others], 1), [latents]) == (1, 4)
    frames = torch.rand(1, 6, 4, 3, 3)
    assert scaled_part(torch.cat([frames, torch.rand(1, 6, 4, 3, 3)], 2), [frames]) == (2, 4)


def test_latents_that_are_elsewhere_are_not_found() -> None:
    latents, others = torch.rand(2, 4, 3, 3), torch.rand(2, 5, 3, 3)
    for model_input in (
        torch.cat([others, latents], 1), torch.cat([latents] * 2), latents * 2, latents[:1], latents[None],
        latents[:, :3],
    ):  # fmt: skip
        assert scaled_part(model_input, [latents]) is None
    assert scaled_part(latents, []) is None


@pytest.mark.parametrize("index", [-1, 4])
def test_input_scale_outside_the_timesteps_is_not_known(index: int) -> None:
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    assert input_scale(scheduler, index) is None


def test_input_scale_of_a_watched_noise_scheduler_reports_nothing() -> None:
    scheduler, tracker = KDPM2DiscreteScheduler(), new_tracker()
    watch(scheduler, tracker)
    scheduler.set_timesteps(4)
    assert tracker.place().step == 0
    assert input_scale(scheduler, 3) is not None
    assert tracker.place().channel == 1
