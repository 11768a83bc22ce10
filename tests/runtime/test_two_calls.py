"""Guidance as two calls of a step: the second group begins before its call, and is told if it was wrong."""

from __future__ import annotations

import functools
import os
import signal
import time
from typing import Any

import pytest
import torch

import asyncdiff
from asyncdiff.errors import WorkerError
from asyncdiff.pipeline.denoiser import replaced_forward
from asyncdiff.runtime.executor import RoundCall
from asyncdiff.runtime.remote import RemoteExecutor
from asyncdiff.tiny import TINY_PIPELINES, TinyCall, generate

pytestmark = pytest.mark.filterwarnings("ignore::asyncdiff.pipeline.user_warning.AsyncDiffWarning")

NUM_WORKERS = 3
STEPS = 7
CALL = TinyCall(steps=STEPS)


@pytest.fixture
def foreseen(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every round of the second group, whether its workers were at it when it was called."""
    told: list[bool] = []
    original = RemoteExecutor._told_already

    def spy(self: RemoteExecutor, call: RoundCall) -> frozenset[int]:
        ranks = original(self, call)
        if self._rank_stages[0] is None:
            told.append(bool(ranks))
        return ranks

    monkeypatch.setattr(RemoteExecutor, "_told_already", spy)
    return told


def make(family: str, pipe: Any) -> torch.Tensor:
    return generate(TINY_PIPELINES[family], pipe, CALL)


@pytest.mark.usefixtures("spawned")
@pytest.mark.parametrize(
    ("family", "options"),
    [
        pytest.param("wan-2.1", {"num_stages": 1}, id="wan-N1"),
        pytest.param("qwen-image", {"num_stages": 2, "warmup_steps": 2}, id="qwen-N2"),
        *(
            pytest.param(family, options, id=f"{family}-{name}", marks=pytest.mark.wide)
            for family in ("wan-2.1", "cogview4", "flux-true-cfg", "hunyuan-video-true-cfg")
            for name, options in {
                "linear": {"num_stages": 2, "forecast": "linear"},
                "paper": {"num_stages": 2, "partition": "chain", "forecast": "none", "freshness": "paper"},
                "stride": {"num_stages": 1, "stride": 2, "warmup_steps": 2},
                "gate": {"num_stages": 2, "warmup_steps": "auto", "tolerance": 0.05},
            }.items()
        ),
    ],
)
def test_each_call_has_a_group_which_begins_with_the_first(
    family: str, options: dict[str, Any], foreseen: list[bool]
) -> None:
    """Bitwise what one group makes of one call after the other: each call has states of its own there too."""
    pipe = TINY_PIPELINES[family].build()
    alone = make(family, pipe)
    with asyncdiff.parallelize(pipe, runtime="local", guidance="together", **options):
        expected = make(family, pipe)
    with asyncdiff.parallelize(pipe, runtime="local", guidance="split", **options):
        assert torch.equal(make(family, pipe), expected)
    size = options["num_stages"] + options.get("stride", 1) - 1
    with asyncdiff.parallelize(pipe, ["cpu"] * (2 * size), guidance="split", **options) as handle:
        assert torch.equal(make(family, pipe), expected)
        assert torch.equal(make(family, pipe), expected)
        assert any(step.devices[size].compute_s > 0 for step in handle.last_run.steps)
    first, second = foreseen[: len(foreseen) // 2], foreseen[len(foreseen) // 2 :]
    assert first == second
    assert first == [False] + [True] * (len(first) - 1), "all but the first, of which nothing is known"
    if options["num_stages"] == 1 and "stride" not in options:
        assert torch.equal(expected, alone), "nothing is stale"


def changing(forward: Any, steps: set[int]) -> Any:
    """A pipeline whose second call has another prompt at some steps."""
    calls = 0

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        step, is_second = divmod(calls, 2)
        calls += 1
        if is_second and step in steps:
            kwargs["encoder_hidden_states"] = kwargs["encoder_hidden_states"] * (1 + step)
        return forward(*args, **kwargs)

    return run


@pytest.mark.usefixtures("spawned")
@pytest.mark.parametrize("num_stages", [1, 2])
def test_wrong_guesses_are_computed_again(num_stages: int, foreseen: list[bool]) -> None:
    pipe = TINY_PIPELINES["wan-2.1"].build()
    denoiser, steps = pipe.transformer, {2, 4}

    def changed() -> torch.Tensor:
        with replaced_forward(denoiser, changing(denoiser.forward, steps)):
            return make("wan-2.1", pipe)

    options = {"num_stages": num_stages, "forecast": "linear"}
    with asyncdiff.parallelize(pipe, guidance="together", runtime="local", **options):
        expected, plain = changed(), make("wan-2.1", pipe)
    assert not torch.equal(expected, plain)
    with asyncdiff.parallelize(pipe, ["cpu"] * (2 * num_stages), guidance="split", **options):
        assert torch.equal(changed(), expected)
        # Wrong where the prompt changes, and where it changes back; then nobody guesses any more.
        assert foreseen == [step in (1,) for step in range(STEPS)]
        assert torch.equal(make("wan-2.1", pipe), plain)
        assert torch.equal(changed(), expected)


@pytest.mark.usefixtures("spawned")
def test_second_call_may_stop_coming_and_come_back() -> None:
    """A guidance interval: what was begun for it is given up, and its states are not used later."""
    pipe = TINY_PIPELINES["wan-2.1"].build()
    denoiser = pipe.transformer

    def within_interval() -> torch.Tensor:
        calls, forward = 0, denoiser.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            step, is_second = divmod(calls, 2)
            calls += 1
            if is_second and step in (2, 3):
                return (torch.zeros_like(kwargs["hidden_states"]),)
            return forward(*args, **kwargs)

        with replaced_forward(denoiser, run):
            return make("wan-2.1", pipe)

    options = {"num_stages": 2, "forecast": "linear"}
    with asyncdiff.parallelize(pipe, guidance="together", runtime="local", **options):
        expected = within_interval()
    with asyncdiff.parallelize(pipe, ["cpu"] * 4, guidance="split", **options):
        assert torch.equal(within_interval(), expected)
        assert torch.equal(within_interval(), expected)


def test_worker_of_the_second_call_that_dies_is_named() -> None:
    pipe = TINY_PIPELINES["wan-2.1"].build()
    alone = make("wan-2.1", pipe)

    def kill(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 3:
            os.kill(handle.workers[0].pid, signal.SIGKILL)
        return {}

    handle = asyncdiff.parallelize(pipe, ["cpu"] * 2, guidance="split")
    make("wan-2.1", pipe)
    start = time.monotonic()
    with pytest.raises(WorkerError, match=r"rank 1 .*stage 0. ended unexpectedly at step") as caught:
        generate(TINY_PIPELINES["wan-2.1"], pipe, CALL, callback_on_step_end=kill)
    assert time.monotonic() - start < 15
    assert (caught.value.rank, caught.value.stage) == (1, 0)
    assert caught.value.step == 4
    handle.remove()
    assert torch.equal(make("wan-2.1", pipe), alone)
