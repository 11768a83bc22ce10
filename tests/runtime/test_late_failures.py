"""A worker fails in what is left of a run when nobody waits for it any more: that costs nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from saboteur import order, sabotage
from tiny_pipelines import generate, tiny_pipeline

import asyncdiff
from asyncdiff.pipeline.handle import Handle

pytestmark = pytest.mark.usefixtures("spawned")

THREE: dict[str, Any] = {
    "devices": ["cpu"] * 3,
    "partition": [
        ["conv_in", "down_blocks"],
        ["mid_block", "up_blocks.0"],
        ["up_blocks.1", "conv_norm_out", "conv_out"],
    ],
}
NUM_STEPS = 8
LAST_STEP = 4
WHEN = pytest.mark.parametrize(
    ("action", "wait_s"), [("fail late", 0.0), ("fail", 0.5)], ids=["later", "before"]
)


class StoppedError(Exception):
    """The user's own."""


@pytest.fixture
def orders(tmp_path: Path) -> Path:
    return tmp_path / "orders"


def sabotaged(orders: Path) -> Any:
    pipe = tiny_pipeline()
    sabotage(pipe, "mid_block", orders)
    return pipe


def ending_with(handle: Handle, orders: Path, action: str, end: Callable[[], None]) -> Callable[..., Any]:
    """A callback that calls `end` after LAST_STEP, while the middle stage computes for the step after it, or
    fails to."""

    def callback(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if index == LAST_STEP - 1:
            _ = handle.last_run  # answered when all that was asked of the workers is done
            order(orders, action)
        elif index == LAST_STEP:
            end()
        return kwargs

    return callback


def fail_at_the_end(pipe: Any, handle: Handle, orders: Path, action: str) -> None:
    def end() -> None:
        raise StoppedError

    with pytest.raises(StoppedError):
        generate(pipe, num_steps=NUM_STEPS, callback_on_step_end=ending_with(handle, orders, action, end))


@WHEN
def test_weights_of_a_worker_that_failed_are_given_back(orders: Path, action: str, wait_s: float) -> None:
    pipe = sabotaged(orders)
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    with asyncdiff.parallelize(pipe, **THREE) as handle:
        expected = generate(pipe)
        fail_at_the_end(pipe, handle, orders, action)
        time.sleep(wait_s)
    assert not orders.exists()
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.unet.state_dict().items())
    with asyncdiff.parallelize(pipe, **THREE):
        assert torch.equal(generate(pipe), expected)


@WHEN
def test_run_goes_on_when_the_weights_have_been_at_home(orders: Path, action: str, wait_s: float) -> None:
    """As for an adapter that is loaded in the middle of a run: what failed is not used any more."""
    pipe = sabotaged(orders)

    def picture(**options: Any) -> torch.Tensor:
        with asyncdiff.parallelize(pipe, partition=THREE["partition"], **options) as handle:

            def bring_home() -> None:
                time.sleep(wait_s)
                with handle._division.whole_weights():
                    orders.unlink(missing_ok=True)

            callback = ending_with(handle, orders, action, bring_home)
            if options["runtime"] == "local":
                callback = ending_with(handle, orders.with_name("nobody"), action, bring_home)
            return generate(pipe, num_steps=NUM_STEPS, callback_on_step_end=callback)

    expected = picture(num_stages=3, runtime="local")
    assert torch.equal(picture(devices=THREE["devices"], runtime="spawn"), expected)


@WHEN
def test_next_run_may_have_another_size(orders: Path, action: str, wait_s: float) -> None:
    """Its stages are prepared before its first round, which is when the run before it is forgotten."""
    pipe = sabotaged(orders)
    with asyncdiff.parallelize(pipe, partition=THREE["partition"], num_stages=3, runtime="local"):
        generate(pipe)
        expected = generate(pipe, size=16)
    with asyncdiff.parallelize(pipe, **THREE) as handle:
        fail_at_the_end(pipe, handle, orders, action)
        time.sleep(wait_s)
        assert torch.equal(generate(pipe, size=16), expected)


@WHEN
def test_other_handle_with_the_same_workers_goes_on(orders: Path, action: str, wait_s: float) -> None:
    """As two handles in one torchrun job have them."""
    first, second = sabotaged(orders), tiny_pipeline()
    with asyncdiff.parallelize(first, **THREE) as handle, asyncdiff.parallelize(second, **THREE):
        expected, expected_of_second = generate(first), generate(second)
        fail_at_the_end(first, handle, orders, action)
        time.sleep(wait_s)
        assert torch.equal(generate(second), expected_of_second)
        assert torch.equal(generate(first), expected)
        fail_at_the_end(first, handle, orders, action)
        third = tiny_pipeline()
        with asyncdiff.parallelize(third, **THREE):
            assert torch.equal(generate(third), expected_of_second)


def test_copy_of_the_last_stage_fails_when_its_handle_is_gone(orders: Path) -> None:
    """It holds nothing that must be fetched, so nobody waits for it in `remove`; the next handle would."""
    pipe = tiny_pipeline()
    sabotage(pipe, "conv_out", orders)
    options: dict[str, Any] = {"devices": ["cpu"] * 3, "num_stages": 2, "stride": 2, "partition": "chain"}
    handle = asyncdiff.parallelize(pipe, **options)
    expected = generate(pipe)

    def callback(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if index == 0:  # the copy computes the second step of the next round
            _ = handle.last_run
            order(orders, "fail late", handle.workers[1].pid)
        elif index == 1:
            raise StoppedError
        return kwargs

    with pytest.raises(StoppedError):
        generate(pipe, callback_on_step_end=callback)
    handle.remove()
    with asyncdiff.parallelize(pipe, **options):
        assert torch.equal(generate(pipe), expected)
    assert not orders.exists()
