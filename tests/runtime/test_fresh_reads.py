"""What arrives in time is read in the round that produces it, in processes as in one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_pipelines import generate, tiny_pipeline

import asyncdiff
from asyncdiff.planner import Plan, freshness
from asyncdiff.runtime import remote
from asyncdiff.runtime.lookahead import Announcement, announce


@pytest.fixture
def free_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a tiny denoiser take less than the least that a transfer is taken to take."""
    monkeypatch.setattr(freshness, "_LINKS", {"cpu": (0.0, float("inf"))})


def fresh_plan(pipe: Any, num_stages: int, stride: int, kind: str = "chain", **options: Any) -> Plan:
    with asyncdiff.parallelize(
        pipe, num_stages=num_stages, stride=stride, partition=kind, **options
    ) as handle:
        generate(pipe)
        plan = handle.plan
    assert plan is not None
    return replace(plan, devices=("cpu",) * plan.num_workers)


@pytest.mark.usefixtures("spawned", "free_links")
@pytest.mark.parametrize(
    ("shape", "forecast", "dtype"),
    [
        ((2, 1), "linear", torch.float32),
        ((3, 1), "damped", torch.bfloat16),
        ((2, 2), "damped", torch.float32),
        ((2, 2), "none", torch.float32),
        ((3, 1), "latents", torch.float32),
        ((2, 2), "latents", torch.bfloat16),
    ],
)
def test_spawned_workers_equal_local_executor(
    shape: tuple[int, int], forecast: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With workers that are told of a round in advance, and wait for the driver in it."""
    made: list[Announcement | None] = []
    monkeypatch.setattr(
        remote, "announce", lambda *args, **how: made.append(announce(*args, **how)) or made[-1]
    )
    pipe = tiny_pipeline(dtype=dtype)
    untouched = generate(pipe)
    plan = fresh_plan(pipe, *shape, forecast=forecast, warmup_steps=2)
    assert plan.fresh
    with asyncdiff.parallelize(pipe, plan=plan, runtime="local"):
        expected = generate(pipe, num_steps=8)
    with asyncdiff.parallelize(pipe, plan=replace(plan, fresh=()), runtime="local"):
        assert not torch.equal(generate(pipe, num_steps=8), expected)
    with asyncdiff.parallelize(pipe, plan=plan) as handle:
        for _ in range(2):
            assert torch.equal(generate(pipe, num_steps=8), expected)
        if shape[1] == 1:
            told = [each.ranks for each in made if each is not None]
            assert frozenset(range(1, shape[0])) in told
        handle.set(warmup_steps=5)
        assert torch.equal(generate(pipe), untouched)
    assert torch.equal(generate(pipe), untouched)


@pytest.mark.usefixtures("spawned", "free_links")
def test_a_worker_that_waits_for_the_driver_hears_of_everything_else() -> None:
    """A run is broken off when the next round has been announced; then a report is asked for, another
    resolution comes, and the pipeline is taken apart."""

    class BrokenOffError(Exception):
        pass

    def break_off(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 5:
            raise BrokenOffError
        return {}

    pipe = tiny_pipeline()
    plan = fresh_plan(pipe, 2, 1, warmup_steps=2)
    with asyncdiff.parallelize(pipe, plan=plan, runtime="local"):
        expected = [generate(pipe, num_steps=8, size=size) for size in (8, 16)]
    with asyncdiff.parallelize(pipe, plan=plan) as handle:
        for asks in ("report", "another resolution", "removal"):
            with pytest.raises(BrokenOffError):
                generate(pipe, num_steps=8, callback_on_step_end=break_off)
            if asks == "report":
                assert len(handle.last_run.steps) == 6
            elif asks == "another resolution":
                assert torch.equal(generate(pipe, num_steps=8, size=16), expected[1])
                assert torch.equal(generate(pipe, num_steps=8, size=8), expected[0])


@pytest.mark.usefixtures("free_links")
def test_paper_reads_nothing_in_time() -> None:
    pipe = tiny_pipeline()
    latents = {}
    for name in ("auto", "paper"):
        plan = fresh_plan(pipe, 2, 1, "nested", freshness=name, forecast="none")
        assert plan.fresh == ()
        with asyncdiff.parallelize(pipe, plan=plan, runtime="local"):
            latents[name] = generate(pipe, num_steps=6)
    assert not torch.equal(latents["auto"], latents["paper"]), "E of a nested split"
