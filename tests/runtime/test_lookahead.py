"""A worker that needs nothing from the driver goes ahead; a wrong guess changes nothing but time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_pipelines import generate, tiny_pipeline

import asyncdiff
from asyncdiff.protocol.messages import RoundInfo
from asyncdiff.runtime import remote
from asyncdiff.runtime.executor import RoundCall
from asyncdiff.runtime.lookahead import Announcement, announce
from asyncdiff.schedule import build_schedule
from asyncdiff.tiny import TINY_PIPELINES, TinyCall
from asyncdiff.tiny import generate as generate_tiny

NEEDED = {0: ("sample", "timestep", "text"), 1: ("timestep", "text"), 2: ("timestep",)}


def info(step: int, **changes: Any) -> RoundInfo:
    return RoundInfo(**{"run": 1, "channel": "a", "key": 0, "first_step": step, "floats": {}, **changes})


def call_of(step: int, *, kind: str = "chain", stages: int = 3, **tensors: torch.Tensor) -> RoundCall:
    schedule = build_schedule(kind=kind, num_stages=stages, stride=1, warmup_steps=2, num_steps=6)
    return RoundCall(info(step), schedule.round_of(step), tensors)


def test_only_ranks_whose_inputs_are_known_and_that_wait_for_no_other_worker_are_told() -> None:
    timestep, text = torch.tensor(3), torch.ones(2)

    def ranks(call: RoundCall) -> frozenset[int]:
        announcement = announce(call, NEEDED, (0, 1, 2))
        return frozenset() if announcement is None else announcement.ranks

    assert ranks(call_of(3, timestep=timestep, text=text)) == {1, 2}
    assert ranks(call_of(3, timestep=timestep)) == {2}  # stage 1 needs the text
    assert ranks(call_of(3, text=text)) == frozenset()
    assert ranks(call_of(1, timestep=timestep, text=text)) == {1, 2}, "in order they wait for the driver"
    assert ranks(call_of(1, timestep=timestep)) == frozenset(), "and stage 2 for stage 1, which is not told"
    assert ranks(call_of(3, kind="nested", timestep=timestep, text=text)) == {1, 2}


def test_a_guess_is_right_only_if_all_that_was_told_is_the_same() -> None:
    timestep, text = torch.tensor(3), torch.ones(2000)
    guess = call_of(3, timestep=timestep, text=text)
    announcement = announce(guess, NEEDED, (0, 1, 2))
    assert isinstance(announcement, Announcement)

    def called(**changes: Any) -> RoundCall:
        tensors = {"sample": torch.zeros(1), "timestep": torch.tensor(3), "text": text}
        return RoundCall(info(3, **changes.pop("info", {})), guess.round, {**tensors, **changes})

    assert announcement.came_true(called())
    assert announcement.came_true(called(info={"history_depth": 1}))
    assert not announcement.came_true(called(timestep=torch.tensor(4)))
    assert not announcement.came_true(called(timestep=torch.tensor(3.0)))
    assert not announcement.came_true(called(text=text.clone())), "large tensors are not compared"
    patient = replace(announcement, may_wait=True)
    assert patient.came_true(called(text=text.clone()))
    assert not patient.came_true(called(text=text + 1))
    for change in ({"run": 2}, {"channel": "b"}, {"key": 1}, {"first_step": 4}, {"floats": {"g": 2.0}}):
        assert not announcement.came_true(called(info=change)), change
    assert not announcement.came_true(call_of(4, timestep=timestep, text=text))
    text.add_(1)
    assert not announcement.came_true(called()), "written to since"


@pytest.fixture
def announced(monkeypatch: pytest.MonkeyPatch) -> list[Announcement]:
    """What the driver announces."""
    made: list[Announcement] = []

    def noted(*args: Any, **options: Any) -> Announcement | None:
        found = announce(*args, **options)
        if found is not None:
            made.append(found)
        return found

    monkeypatch.setattr(remote, "announce", noted)
    return made


def change_embeds(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Another object with other values: a prompt that changes half-way."""
    return {"prompt_embeds": values["prompt_embeds"] * 0.5} if step == 3 else {}


def write_into_embeds(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
    if step in (2, 4):
        values["prompt_embeds"].mul_(0.5)
    return {}


def change_timesteps(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
    """The list that the guess was read from is not what the next call uses."""
    if step == 3:
        pipe.scheduler.timesteps[step + 1] -= 7
    return {}


SURPRISES: dict[str, Callable[..., dict[str, Any]]] = {
    "other prompt": change_embeds,
    "prompt written to": write_into_embeds,
    "other timestep": change_timesteps,
}


@pytest.mark.usefixtures("spawned")
@pytest.mark.parametrize("surprise", SURPRISES)
@pytest.mark.parametrize("forecast", ["linear", "none"])
def test_a_wrong_guess_changes_nothing_but_time(
    surprise: str, forecast: str, announced: list[Announcement]
) -> None:
    options: dict[str, Any] = {"partition": "chain", "forecast": forecast}
    extra: dict[str, Any] = {
        "callback_on_step_end": SURPRISES[surprise],
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }
    pipe = tiny_pipeline()
    with asyncdiff.parallelize(pipe, num_stages=3, runtime="local", **options):
        expected = generate(pipe, num_steps=8, **extra)
        undisturbed = generate(pipe, num_steps=8)
    assert not torch.equal(expected, undisturbed)
    with asyncdiff.parallelize(pipe, devices=["cpu"] * 3, **options) as handle:
        assert torch.equal(generate(pipe, num_steps=8), undisturbed)
        assert len(announced) == 6, "every asynchronous step but the first could be told ahead"
        assert {2} <= announced[-1].ranks <= {1, 2}
        announced.clear()
        assert torch.equal(generate(pipe, num_steps=8, **extra), expected)
        assert announced
        steps = handle.last_run.steps
        assert len(steps) == 8
        computed = [[device.compute_s > 0 for device in step.devices] for step in steps]
        assert all(map(all, computed[1:-1])), computed
        assert torch.equal(generate(pipe, num_steps=8), undisturbed)


@pytest.mark.usefixtures("spawned")
@pytest.mark.parametrize(
    "name",
    ["sd3", "ltx", *(pytest.param(name, marks=pytest.mark.wide) for name in ("flux", "sd21", "sana", "svd"))],
)
def test_guesses_come_true(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of pipelines that pass the timestep expanded to the batch, as most do, too."""
    came_true, found = Announcement.came_true, []

    def noted(announcement: Announcement, call: RoundCall) -> bool:
        found.append(came_true(announcement, call))
        return found[-1]

    monkeypatch.setattr(Announcement, "came_true", noted)
    family = TINY_PIPELINES[name]
    pipe = family.build()
    with asyncdiff.parallelize(pipe, devices=["cpu", "cpu"], num_stages=2):
        generate_tiny(family, pipe, TinyCall(steps=8))
    assert found == [True] * len(found)
    assert len(found) >= 4


@pytest.mark.usefixtures("spawned")
def test_a_run_that_ends_early_leaves_nothing_behind(announced: list[Announcement]) -> None:
    def stop(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 4
        return {}

    def fail(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 4:
            raise ZeroDivisionError
        return {}

    pipe = tiny_pipeline()
    untouched = generate(pipe)
    with asyncdiff.parallelize(pipe, num_stages=2, runtime="local", partition="chain"):
        expected = generate(pipe, num_steps=8)
        wide = generate(pipe, num_steps=8, size=16)
    with asyncdiff.parallelize(pipe, devices=["cpu", "cpu"], partition="chain"):
        for again in (lambda: generate(pipe, num_steps=8), lambda: generate(pipe, num_steps=8, size=16)):
            wanted = again()
            generate(pipe, num_steps=8, callback_on_step_end=stop)
            assert announced[-1].call.info.first_step == 5
            assert torch.equal(again(), wanted)
            with pytest.raises(ZeroDivisionError):
                generate(pipe, num_steps=8, callback_on_step_end=fail)
            assert torch.equal(again(), wanted)
        assert torch.equal(wanted, wide)
        assert torch.equal(generate(pipe, num_steps=8), expected)
        generate(pipe, num_steps=8, callback_on_step_end=stop)
    assert torch.equal(generate(pipe), untouched)  # weights came home past what was announced
