"""What a person does within the first hour: calls of all kinds one after the other, without resetting
anything.

"Right" means: what a freshly parallelized pipeline gives for that call alone.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import diffusers
import pytest
import torch
from random_pipelines import generate, sd, sd3

import asyncdiff
from asyncdiff.pipeline.user_warning import AsyncDiffWarning

pytestmark = pytest.mark.filterwarnings("ignore::asyncdiff.pipeline.user_warning.AsyncDiffWarning")

DIVISION = {"num_stages": 2, "stride": 2, "warmup_steps": 2}
FIRST = {"steps": 8}


def alone(plan: asyncdiff.Plan, **call: Any) -> torch.Tensor:
    """With the given plan: which cut is best depends on the first call's resolution."""
    pipe = sd()
    with asyncdiff.parallelize(pipe, plan=plan):
        return generate(pipe, **call)


@pytest.mark.parametrize(
    "second",
    [
        {"steps": 8},
        {"steps": 8, "seed": 1},
        {"steps": 8, "size": 16},
        {"steps": 8, "batch": 2},
        {"steps": 8, "num_images_per_prompt": 2},
        {"steps": 5},
        {"steps": 11},
        {"steps": 8, "guidance": 9.0},
        {"steps": 8, "guidance": 1.0},
    ],
    ids=lambda second: ",".join(f"{k}={v}" for k, v in second.items()),
)
def test_second_image_is_right(second: dict[str, Any]) -> None:
    pipe = sd()
    with asyncdiff.parallelize(pipe, **DIVISION) as handle:
        first = generate(pipe, **FIRST)
        assert torch.equal(generate(pipe, **second), alone(handle.plan, **second))
        assert torch.equal(generate(pipe, **FIRST), first)


def test_structures_are_analysed_once() -> None:
    pipe = sd()
    with asyncdiff.parallelize(pipe, **DIVISION) as handle:
        for _ in range(2):
            generate(pipe, steps=8)
            generate(pipe, steps=8, guidance=1.0)
        structures = handle._division.installations[0].structures
        assert len(structures.analyses) == 2
        assert next(structures._numbers) == 2


@pytest.mark.parametrize("name", ["PNDMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"])
def test_replaced_noise_scheduler_is_followed(name: str) -> None:
    pipe = sd()
    with asyncdiff.parallelize(pipe, **DIVISION):
        generate(pipe, steps=8)
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
        unused = copy.deepcopy(pipe.scheduler)
        replaced = generate(pipe, steps=8)
    pipe = sd()
    pipe.scheduler = unused
    with asyncdiff.parallelize(pipe, **DIVISION):
        assert torch.equal(replaced, generate(pipe, steps=8))


def test_replaced_noise_schedulers_are_let_go() -> None:
    import gc
    import weakref

    pipe = sd()
    with asyncdiff.parallelize(pipe, **DIVISION) as handle:
        old = weakref.ref(pipe.scheduler)
        generate(pipe, steps=5)
        for _ in range(3):
            pipe.scheduler = diffusers.DDIMScheduler()
            generate(pipe, steps=5)
        gc.collect()
        assert old() is None
        assert len(handle._division.installations[0]._channels) == 1
        assert len(handle._division.installations[0].executor._interpreters[0]._states) == 1


def test_pndm_is_placed_step_by_step() -> None:
    pipe = sd(scheduler=diffusers.PNDMScheduler(skip_prk_steps=True))
    with asyncdiff.parallelize(pipe, num_stages=2) as handle:
        generate(pipe, steps=8)
        # PNDM without Runge-Kutta steps calls the denoiser twice at one timestep.
        assert [step.step for step in handle.last_run.steps] == list(range(9))


def turn_guidance_off(at: int) -> dict[str, Any]:
    """Pipeline arguments that end guidance after step `at`, as diffusers' documentation of callbacks does."""

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == at:
            pipe._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        return tensors

    return {
        "callback_on_step_end": callback,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    }


@pytest.mark.parametrize("at", [2, 3, 4])
def test_guidance_turned_off_in_mid_run_warms_up_again(at: int) -> None:
    pipe = sd()
    with asyncdiff.parallelize(pipe, **DIVISION) as handle:
        generate(pipe, steps=10, **turn_guidance_off(at))
        rounds = {r.first_step for r in handle._division.installations[0].executor._interpreters[0]._records}
        # In order the steps before and after, whichever step of a round this was: two each.
        assert {0, 1, at + 1, at + 2} <= rounds
        assert at + 4 not in rounds or at + 3 in rounds
        first = generate(pipe, steps=10)
    assert torch.equal(first, alone(handle.plan, steps=10))


def test_guidance_turned_off_before_asynchronous_steps_is_exact() -> None:
    pipe = sd()
    exact = generate(pipe, steps=7, **turn_guidance_off(3))
    with asyncdiff.parallelize(pipe, num_stages=3, warmup_steps=4):
        assert torch.equal(generate(pipe, steps=7, **turn_guidance_off(3)), exact)


def test_callback_may_modify_latents() -> None:
    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"].mul_(0.9)}

    pipe = sd()
    exact = generate(pipe, callback_on_step_end=callback)
    with asyncdiff.parallelize(pipe, num_stages=2, warmup_steps=99) as handle:
        assert torch.equal(generate(pipe, callback_on_step_end=callback), exact)
        handle.set(warmup_steps=1)
        assert not torch.equal(generate(pipe, callback_on_step_end=callback), generate(pipe))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [0, 3, 4])
def test_exception_in_a_callback_leaves_nothing_behind(error: type[BaseException], at: int) -> None:
    def fail(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == at:
            raise error("stop")
        return tensors

    pipe = sd()
    with asyncdiff.parallelize(pipe, **DIVISION) as handle:
        with pytest.raises(error, match="stop"):
            generate(pipe, steps=8, seed=1, callback_on_step_end=fail)
        assert [step.step for step in handle.last_run.steps] == list(range(at + 1))
        assert torch.equal(generate(pipe, steps=8), alone(handle.plan, steps=8))


def test_interrupted_pipeline_leaves_nothing_behind() -> None:
    def interrupt(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 3
        return tensors

    pipe = sd()
    with asyncdiff.parallelize(pipe, **DIVISION) as handle:
        generate(pipe, steps=8, seed=1, callback_on_step_end=interrupt)
        assert torch.equal(generate(pipe, steps=8), alone(handle.plan, steps=8))


def test_run_too_short_to_gain_warns_once_at_the_users_line() -> None:
    pipe = sd()
    with asyncdiff.parallelize(pipe, num_stages=2, warmup_steps=2):
        with pytest.warns(AsyncDiffWarning, match="5 steps with warmup_steps=2 is too short") as caught:
            generate(pipe, steps=5)
        assert caught[0].filename.endswith("random_pipelines.py")
        with warnings.catch_warnings():
            warnings.simplefilter("error", AsyncDiffWarning)
            generate(pipe, steps=5)
            generate(pipe, steps=6)


def test_stride_longer_than_the_run_is_refused() -> None:
    pipe = sd()
    with asyncdiff.parallelize(pipe, num_stages=2, stride=4):
        with pytest.raises(asyncdiff.ConfigurationError, match="stride=4 is longer than the run of 3 steps"):
            generate(pipe, steps=3)
        generate(pipe, steps=4)


def test_inference_mode_changes_nothing() -> None:
    pipe = sd()
    with asyncdiff.parallelize(pipe, **DIVISION):
        plain = generate(pipe, steps=8)
        with torch.inference_mode():
            assert torch.equal(generate(pipe, steps=8), plain)
        assert torch.equal(generate(pipe, steps=8), plain)


def test_ambiguous_timesteps_cost_a_step_in_order_once() -> None:
    """At t = 0 nothing tells t from t/1000: the look-ahead of a stride waits until something does."""
    pipe = sd3(scheduler=_UpsideDown())
    with asyncdiff.parallelize(pipe, num_stages=2, stride=2, warmup_steps=1) as handle:
        first, second = (
            (
                generate(pipe, steps=8),
                [s.step for s in handle.last_run.steps if any(d.compute_s for d in s.devices)],
            )
            for _ in range(2)
        )
    assert first[1] == [0, 1, 2, 4, 6]
    assert second[1] == [0, 1, 3, 5, 7]


class _UpsideDown(diffusers.FlowMatchEulerDiscreteScheduler):
    """Begins with two timesteps of 0, as no noise scheduler does."""

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        self.timesteps[:2] = 0.0
        self.set_begin_index(0)
