"""Several pipelines with one denoiser: one installation serves all of them."""

from __future__ import annotations

import threading
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from random_pipelines import generate, prompt, quiet, sd

import asyncdiff

pytestmark = pytest.mark.filterwarnings("ignore::asyncdiff.pipeline.user_warning.AsyncDiffWarning")

DIVISION = {"num_stages": 2, "stride": 2, "warmup_steps": 2}


def image_to_image(pipe: Any, **changes: Any) -> torch.Tensor:
    picture = np.random.default_rng(0).random((1, 8, 8, 3), dtype=np.float32)
    call: dict[str, Any] = {
        "image": picture, "strength": 0.7, "num_inference_steps": 10, "guidance_scale": 4.0,
        "generator": torch.Generator().manual_seed(3), "output_type": "latent", **prompt(pipe),
    }  # fmt: skip
    return pipe(**(call | changes)).images


def second_pipeline(pipe: Any, how: str) -> Any:
    if how == "from_pipe":
        return quiet(StableDiffusionImg2ImgPipeline.from_pipe(pipe))
    parts = dict(pipe.components)
    if how == "own scheduler":
        parts["scheduler"] = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    return quiet(StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False))


@pytest.mark.parametrize("how", ["from_pipe", "components", "own scheduler"])
def test_image_to_image_made_from_the_same_components(how: str) -> None:
    pipe = sd()
    exact = image_to_image(second_pipeline(pipe, how))
    with asyncdiff.parallelize(pipe, **DIVISION) as handle:
        first = generate(pipe, steps=8)
        other = second_pipeline(pipe, how)
        handle.set(warmup_steps=99)
        assert torch.equal(image_to_image(other), exact)
        # 10 steps at strength 0.7 are the last 7 of the noise scheduler's timesteps.
        assert [step.step for step in handle.last_run.steps] == list(range(7))
        handle.set(warmup_steps=2)
        asynchronous = image_to_image(other)
        assert [s.step for s in handle.last_run.steps if any(d.compute_s for d in s.devices)] == [
            0,
            1,
            2,
            4,
            6,
        ]
        for _ in range(2):  # alternating
            assert torch.equal(generate(pipe, steps=8), first)
            assert torch.equal(image_to_image(other), asynchronous)
    assert torch.equal(image_to_image(other), exact)


def own_scheduler(pipe: Any) -> Any:
    parts = dict(pipe.components)
    parts["scheduler"] = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    return quiet(StableDiffusionPipeline(**parts, requires_safety_checker=False))


def test_interleaved_steps_are_told_apart() -> None:
    """A whole run of another pipeline after each step: every call belongs to the run of its caller."""
    pipe = sd()
    with asyncdiff.parallelize(pipe, **DIVISION):
        other = own_scheduler(pipe)
        outer, inner = generate(pipe, steps=8), generate(other, steps=6, seed=1)

        def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            assert torch.equal(generate(other, steps=6, seed=1), inner)
            return tensors

        assert torch.equal(generate(pipe, steps=8, callback_on_step_end=callback), outer)


def test_two_threads_share_a_denoiser() -> None:
    pipe = sd()
    with asyncdiff.parallelize(pipe, **DIVISION):
        pipes = [pipe, own_scheduler(pipe)]
        expected = [generate(p, steps=8, seed=seed) for seed, p in enumerate(pipes)]
        made: list[list[torch.Tensor]] = [[], []]

        def work(number: int) -> None:
            torch.set_num_threads(1)
            for _ in range(3):
                made[number].append(generate(pipes[number], steps=8, seed=number))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    for number in range(2):
        assert len(made[number]) == 3
        assert all(torch.equal(latents, expected[number]) for latents in made[number])


def test_second_parallelize_of_a_shared_denoiser_is_refused() -> None:
    pipe = sd()
    with asyncdiff.parallelize(pipe, num_stages=2):
        with pytest.raises(asyncdiff.ConfigurationError, match="already parallelized"):
            asyncdiff.parallelize(own_scheduler(pipe), num_stages=2)


def test_two_denoisers_do_not_disturb_each_other() -> None:
    one, two = sd(), sd()
    with asyncdiff.parallelize(one, **DIVISION), asyncdiff.parallelize(two, num_stages=3):
        first, second = generate(one, steps=8), generate(two, steps=8)
        assert torch.equal(generate(one, steps=8), first)
    with asyncdiff.parallelize(two, num_stages=3):
        assert torch.equal(generate(two, steps=8), second)
