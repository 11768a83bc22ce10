"""In order through the stages, and as one stage, a pipeline gives bitwise what it gives alone."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from random_pipelines import PIPELINES, generate, sd

import asyncdiff

pytestmark = pytest.mark.filterwarnings("ignore::asyncdiff.pipeline.user_warning.AsyncDiffWarning")

NOISE_SCHEDULERS = (
    diffusers.DDIMScheduler,
    diffusers.PNDMScheduler,
    diffusers.EulerDiscreteScheduler,
    diffusers.EulerAncestralDiscreteScheduler,
    diffusers.DPMSolverMultistepScheduler,
    diffusers.UniPCMultistepScheduler,
    diffusers.HeunDiscreteScheduler,
    diffusers.LCMScheduler,
)
STEPS = 5
ALL = 99


def settings(in_order: bool) -> dict[str, Any]:
    return {"num_stages": 2, "warmup_steps": ALL} if in_order else {"num_stages": 1}


@pytest.mark.parametrize("in_order", [True, False], ids=["in order", "one stage"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", PIPELINES)
def test_pipeline_is_untouched(name: str, dtype: torch.dtype, guidance: float, in_order: bool) -> None:
    pipe = PIPELINES[name]().to(dtype)
    alone = generate(pipe, steps=STEPS, guidance=guidance)
    with asyncdiff.parallelize(pipe, **settings(in_order)):
        assert torch.equal(generate(pipe, steps=STEPS, guidance=guidance), alone)


@pytest.mark.parametrize("scheduler", NOISE_SCHEDULERS, ids=lambda c: c.__name__.removesuffix("Scheduler"))
@pytest.mark.parametrize("name", ["sd"])
def test_noise_scheduler_is_untouched(name: str, scheduler: Any) -> None:
    pipe = PIPELINES[name](scheduler=scheduler())
    alone = generate(pipe, steps=STEPS)
    with asyncdiff.parallelize(pipe, **settings(True)) as handle:
        assert torch.equal(generate(pipe, steps=STEPS), alone)
        # Every call was a step of one run: PNDM and Heun repeat timesteps and call more often than asked.
        calls = len(pipe.scheduler.timesteps)
        assert [step.step for step in handle.last_run.steps] == list(range(calls))


@pytest.mark.parametrize("partition", ["chain", "nested"])
@pytest.mark.parametrize("num_stages", [2, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_every_division_in_order_is_untouched(num_stages: int, stride: int, partition: str) -> None:
    pipe = sd()
    alone = generate(pipe, steps=STEPS)
    with asyncdiff.parallelize(
        pipe, num_stages=num_stages, stride=stride, partition=partition, warmup_steps=STEPS
    ):
        assert torch.equal(generate(pipe, steps=STEPS), alone)


def test_pictures_are_untouched() -> None:
    pipe = sd()
    alone = generate(pipe, output_type="pt")
    with asyncdiff.parallelize(pipe, **settings(True)):
        assert torch.equal(generate(pipe, output_type="pt"), alone)
