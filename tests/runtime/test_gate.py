"""`warmup_steps="auto"`: steps run in order while the forecast misses by more than the tolerance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_pipelines import generate, tiny_pipeline

import asyncdiff
from asyncdiff.errors import ConfigurationError

STEPS = 10


def turn_over(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Half-way the latents jump, and the hidden states with them."""
    return {"latents": values["latents"].flip(-1)} if step == 5 else {}


def run(pipe: Any) -> torch.Tensor:
    return generate(pipe, num_steps=STEPS, callback_on_step_end=turn_over)


@pytest.mark.parametrize("forecast", ["none", "linear", "damped"])
@pytest.mark.parametrize("kind", ["chain", "nested"])
def test_tolerance_decides(kind: str, forecast: str) -> None:
    pipe = tiny_pipeline()
    untouched = run(pipe)
    options: dict[str, Any] = {"num_stages": 3, "partition": kind, "forecast": forecast}
    with asyncdiff.parallelize(pipe, **options, warmup_steps="auto", tolerance=1e-9) as handle:
        assert torch.equal(run(pipe), untouched)
        assert handle.last_run.steps_in_order == tuple(range(STEPS))
        handle.set(warmup_steps="auto", tolerance=1e9)
        loose = run(pipe)
        assert handle.last_run.steps_in_order == (0, 1), "after one step nothing can be said"
        handle.set(warmup_steps=2)
        assert torch.equal(run(pipe), loose)
        assert handle.last_run.steps_in_order == (0, 1)


def test_an_error_that_rises_closes_the_gate_again() -> None:
    """Step 6 is the first that begins with other latents. What stage 0 makes of them is read at step 7, and
    with the prediction for 7 the driver hears how far it is from what was forecast."""
    pipe = tiny_pipeline()
    options: dict[str, Any] = {
        "num_stages": 2,
        "partition": "chain",
        "warmup_steps": "auto",
        "tolerance": 0.35,
    }
    with asyncdiff.parallelize(pipe, **options) as handle:
        generate(pipe, num_steps=STEPS)
        steady = handle.last_run.steps_in_order
        run(pipe)
        jumping = handle.last_run.steps_in_order
    assert steady == tuple(range(len(steady)))
    assert len(steady) <= 6
    assert jumping[: len(steady) + 1] == (*steady, 8)


@pytest.mark.usefixtures("spawned")
@pytest.mark.parametrize(
    ("shape", "kind", "forecast", "tolerance"),
    [
        ((2, 1), "chain", "linear", 0.35),
        ((2, 2), "chain", "damped", 0.35),
        ((3, 1), "nested", "none", 0.45),
    ],
)
def test_spawned_workers_equal_local_executor(
    shape: tuple[int, int], kind: str, forecast: str, tolerance: float
) -> None:
    num_stages, stride = shape
    options: dict[str, Any] = {
        "num_stages": num_stages, "stride": stride, "partition": kind, "forecast": forecast,
        "warmup_steps": "auto", "tolerance": tolerance,
    }  # fmt: skip
    pipe = tiny_pipeline()
    with asyncdiff.parallelize(pipe, runtime="local", **options) as handle:
        expected = run(pipe)
        in_order = handle.last_run.steps_in_order
        plan = handle.plan
    assert plan is not None
    assert 2 < len(in_order) < STEPS
    with asyncdiff.parallelize(pipe, devices=["cpu"] * (num_stages + stride - 1), plan=plan) as handle:
        for _ in range(2):
            assert torch.equal(run(pipe), expected)
            assert handle.last_run.steps_in_order == in_order


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"warmup_steps": "automatic"}, 'an integer or "auto"'),
        ({"warmup_steps": 2, "tolerance": 0.1}, 'goes with warmup_steps="auto"'),
        ({"warmup_steps": "auto", "tolerance": 0}, "above 0"),
        ({"warmup_steps": "auto", "tolerance": float("nan")}, "above 0"),
        ({"warmup_steps": 0}, "at least 1"),
    ],
)
def test_what_is_no_warmup_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        asyncdiff.parallelize(tiny_pipeline(), num_stages=2, **given)
