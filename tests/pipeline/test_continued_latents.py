"""When latents are continued to steps to come, and when states are continued instead."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from random_pipelines import denoiser, generate, sd

import asyncdiff
from asyncdiff.pipeline.course import Course
from asyncdiff.tiny import TINY_PIPELINES, TinyCall, TinyPipeline
from asyncdiff.tiny import generate as generate_tiny

pytestmark = pytest.mark.filterwarnings("ignore::asyncdiff.pipeline.user_warning.AsyncDiffWarning")

STEPS = 9


@pytest.fixture
def continued(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The names of what is continued, each time."""
    found: list[set[str]] = []
    original = Course.continued

    def noting(course: Course, place: float) -> dict[str, torch.Tensor]:
        made = original(course, place)
        found.append(set(made))
        return made

    monkeypatch.setattr(Course, "continued", noting)
    return found


def made_by(pipe: Any, **options: Any) -> torch.Tensor:
    with asyncdiff.parallelize(pipe, **options):
        return generate(pipe, steps=STEPS)


@contextmanager
def stretched_timesteps(pipe: Any) -> Iterator[None]:
    """What the denoiser is given is no function of the timestep that is known."""
    module = denoiser(pipe)
    parallel = vars(module)["forward"]
    module.forward = lambda sample, timestep, *args, **kwargs: parallel(
        sample, timestep * 1.25, *args, **kwargs
    )
    try:
        yield
    finally:
        module.forward = parallel


def test_by_default_a_chain_continues_latents(continued: list[set[str]]) -> None:
    made_by(sd(), num_stages=2, partition="chain")
    assert continued == [{"sample"}] * (STEPS - 2)  # not for the step in order, nor beyond the last step


@pytest.mark.parametrize("num_stages", [2, 3])
def test_states_are_continued_where_timesteps_cannot_be_foreseen(
    num_stages: int, continued: list[set[str]]
) -> None:
    pipe = sd()
    pictures = []
    for forecast in ("latents", "linear"):
        with (
            asyncdiff.parallelize(pipe, num_stages=num_stages, partition="chain", forecast=forecast),
            stretched_timesteps(pipe),
        ):
            pictures.append(generate(pipe, steps=STEPS))
    assert torch.equal(*pictures)
    assert not continued


def test_states_are_continued_where_their_error_is_looked_at(continued: list[set[str]]) -> None:
    options: dict[str, Any] = {"num_stages": 2, "partition": "chain", "warmup_steps": "auto"}
    assert torch.equal(made_by(sd(), **options), made_by(sd(), **options, forecast="linear"))
    assert not continued


@pytest.mark.parametrize("options", [{"num_stages": 1}, {"num_stages": 3, "partition": "nested"}])
def test_nothing_is_continued_where_no_stage_works_ahead(
    options: dict[str, Any], continued: list[set[str]]
) -> None:
    made_by(sd(), **options)
    assert not continued


@pytest.mark.parametrize("options", [{"num_stages": 1}, {"num_stages": 2, "partition": "nested"}])
def test_later_steps_of_a_round_have_latents_of_their_own(
    options: dict[str, Any], continued: list[set[str]]
) -> None:
    made_by(sd(), **options, stride=2)
    assert continued == [{"sample"}] * ((STEPS - 1) // 2)


def test_residuals_of_a_controlnet_are_continued_too(continued: list[set[str]]) -> None:
    family = TINY_PIPELINES["controlnet-sd15"]
    pipe = family.build()
    with asyncdiff.parallelize(pipe, num_stages=2, partition="chain"):
        generate_tiny(family, pipe, TinyCall(steps=5))
    assert all("sample" in names for names in continued)
    assert all(any(name.startswith("down_block_add") for name in names) for names in continued)
    assert continued


def flux_in_bfloat16() -> tuple[Any, TinyPipeline]:
    family = TINY_PIPELINES["flux"]

    def arguments(call: TinyCall) -> dict[str, Any]:
        given = family.arguments(call)
        return {
            name: value.bfloat16() if isinstance(value, torch.Tensor) else value
            for name, value in given.items()
        }

    return family.build().to(torch.bfloat16), replace(family, arguments=arguments)


def test_timesteps_that_are_rounded_cost_no_step_in_order() -> None:
    """1000 / 1000 in bfloat16 is 1, however it was computed: later steps tell, and the likely is right."""
    pipe, family = flux_in_bfloat16()
    with asyncdiff.parallelize(pipe, num_stages=2, partition="chain") as handle:
        first = generate_tiny(family, pipe, TinyCall(steps=6))
        assert handle.last_run.steps_in_order == (0,)
        assert torch.equal(generate_tiny(family, pipe, TinyCall(steps=6)), first)
        assert handle.last_run.steps_in_order == (0,)


@pytest.mark.parametrize(("step", "steps_in_order"), [(1, (0,)), (2, (0, 2))])
def test_timesteps_that_cease_to_follow_a_rule_end_the_work_ahead(
    step: int, steps_in_order: tuple[int, ...], continued: list[set[str]]
) -> None:
    """They are looked at until the rule is sure, here in the first three steps."""
    pipe, family = flux_in_bfloat16()
    with asyncdiff.parallelize(pipe, num_stages=2, partition="chain") as handle:
        parallel, steps = vars(pipe.transformer)["forward"], itertools.count()

        def forward(*, timestep: torch.Tensor, **inputs: Any) -> Any:
            return parallel(timestep=timestep * 1.25 if next(steps) >= step else timestep, **inputs)

        pipe.transformer.forward = forward
        try:
            generate_tiny(family, pipe, TinyCall(steps=6))
        finally:
            pipe.transformer.forward = parallel
        assert handle.last_run.steps_in_order == steps_in_order
    assert len(continued) == step - 1
