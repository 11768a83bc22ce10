"""The same first hour with worker processes: each picture bitwise that of the local executor with the same
plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from random_pipelines import generate, sd
from test_first_hour import turn_guidance_off
from test_shared_denoiser import image_to_image, second_pipeline

import asyncdiff

pytestmark = pytest.mark.filterwarnings("ignore::asyncdiff.pipeline.user_warning.AsyncDiffWarning")


def fail(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    if step == 3:
        raise KeyboardInterrupt
    return tensors


def broken_off(pipe: Any) -> torch.Tensor:
    with pytest.raises(KeyboardInterrupt):
        generate(pipe, steps=8, callback_on_step_end=fail)
    return generate(pipe, steps=8)


def in_inference_mode(pipe: Any) -> torch.Tensor:
    with torch.inference_mode():
        return generate(pipe, steps=8).clone()


def with_another_scheduler(pipe: Any) -> torch.Tensor:
    before = pipe.scheduler
    pipe.scheduler = EulerDiscreteScheduler.from_config(before.config)
    try:
        return generate(pipe, steps=8)
    finally:
        pipe.scheduler = before


def with_freeu(pipe: Any) -> torch.Tensor:
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    try:
        return generate(pipe, steps=8)
    finally:
        pipe.disable_freeu()


HOUR: dict[str, Callable[[Any], torch.Tensor]] = {
    "first": lambda pipe: generate(pipe, steps=8),
    "again": lambda pipe: generate(pipe, steps=8),
    "larger": lambda pipe: generate(pipe, steps=8, size=16),
    "two": lambda pipe: generate(pipe, steps=8, batch=2),
    "no guidance": lambda pipe: generate(pipe, steps=8, guidance=1.0),
    "guidance off at 2": lambda pipe: generate(pipe, steps=10, **turn_guidance_off(2)),
    "guidance off at 3": lambda pipe: generate(pipe, steps=10, **turn_guidance_off(3)),
    "broken off": broken_off,
    "inference mode": in_inference_mode,
    "another scheduler": with_another_scheduler,
    "image to image": lambda pipe: image_to_image(second_pipeline(pipe, "own scheduler")),
    "FreeU": with_freeu,
    "once more": lambda pipe: generate(pipe, steps=8),
}


def test_every_picture_of_the_hour_is_that_of_the_local_executor() -> None:
    pipe = sd()
    alone = generate(pipe, steps=8)
    with asyncdiff.parallelize(pipe, num_stages=2, stride=2, warmup_steps=2) as handle:
        expected = {name: make(pipe) for name, make in HOUR.items()}
        plan = handle.plan
    assert torch.equal(expected["first"], expected["once more"])
    with asyncdiff.parallelize(pipe, 3, plan=plan) as handle:
        assert len(handle.workers) == 2
        handle.set(warmup_steps=99)
        assert torch.equal(generate(pipe, steps=8), alone)
        handle.set(warmup_steps=2)
        different = [name for name, make in HOUR.items() if not torch.equal(make(pipe), expected[name])]
    assert not different
