"""A ControlNet in a process of its own: bitwise the local executor, and what goes wrong."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import wait_until_gone
from saboteur import order, ordering_at, sabotage

import asyncdiff
from asyncdiff.errors import ParallelizedError, WeightsLostError, WorkerError
from asyncdiff.protocol.messages import RoundMessage, TransferredInput
from asyncdiff.runtime.control import WorkerConnection
from asyncdiff.runtime.remote import RemoteExecutor
from asyncdiff.runtime.round_sender import RoundSender
from asyncdiff.tiny import TINY_PIPELINES, TinyCall
from asyncdiff.tiny import generate as generate_tiny

NUM_WORKERS = 2
ERROR_WITHIN_S = 15.0
FAMILY = TINY_PIPELINES["controlnet-sd15"]
ONE: dict[str, Any] = {"num_stages": 1, "guidance": "together"}
SPLIT: dict[str, Any] = {"num_stages": 1, "guidance": "split"}


@pytest.fixture
def orders(tmp_path: Path) -> Path:
    return tmp_path / "orders"


def sabotaged(orders: Path) -> Any:
    pipe = FAMILY.build()
    sabotage(SimpleNamespace(unet=pipe.controlnet), "controlnet_mid_block", orders)
    return pipe


def generate(pipe: Any, steps: int = 5, **changes: Any) -> torch.Tensor:
    return generate_tiny(FAMILY, pipe, TinyCall(steps=steps), **changes)


@pytest.mark.usefixtures("spawned")
@pytest.mark.parametrize("controlnet", ["overlap", "ahead"])
@pytest.mark.parametrize(
    ("options", "num_devices"), [pytest.param(ONE, 2, id="N1"), pytest.param(SPLIT, 3, id="split")]
)
def test_spawned_controlnet_equals_local_executor(
    options: dict[str, Any], num_devices: int, controlnet: str
) -> None:
    check_spawned(options, num_devices, controlnet)


@pytest.mark.wide
@pytest.mark.parametrize("controlnet", ["overlap", "ahead"])
@pytest.mark.parametrize(
    ("options", "num_devices"),
    [
        pytest.param({"num_stages": 2, "partition": "chain"}, 3, id="chain"),
        pytest.param({"num_stages": 3, "partition": "nested"}, 4, id="nested"),
        pytest.param({"num_stages": 2, "stride": 2}, 4, id="stride"),
        pytest.param({"num_stages": 2, "guidance": "split"}, 5, id="split"),
        pytest.param({"num_stages": 2, "guidance_refresh": 2}, 3, id="refresh"),
    ],
)
def test_spawned_controlnet_beside_stages(options: dict[str, Any], num_devices: int, controlnet: str) -> None:
    check_spawned(options, num_devices, controlnet)


def check_spawned(options: dict[str, Any], num_devices: int, controlnet: str) -> None:
    pipe = FAMILY.build()
    untouched = generate(pipe)
    with asyncdiff.parallelize(pipe, runtime="local", controlnet=controlnet, **options):
        expected = generate(pipe)
    devices = ["cpu"] * num_devices
    with asyncdiff.parallelize(pipe, devices=devices, controlnet=controlnet, **options) as handle:
        assert torch.equal(generate(pipe), expected)
        held = sum(parameter.nbytes for parameter in pipe.controlnet.parameters() if not parameter.is_meta)
        assert torch.equal(generate(pipe), expected), "the second picture knows of the first"
        report = handle.last_run
    weights = sum(parameter.nbytes for parameter in pipe.controlnet.parameters())
    assert held < weights / 10, "this process has kept the ControlNet's weights"
    assert len(report.weight_bytes) == len(report.steps[-1].devices) == num_devices
    assert report.weight_bytes[-1] == weights
    assert report.steps[-1].devices[-1].compute_s > 0
    assert torch.equal(generate(pipe), untouched)


@pytest.mark.usefixtures("spawned")
def test_second_half_of_guidance_begins_without_residuals(monkeypatch: pytest.MonkeyPatch) -> None:
    """They reach its worker while the driver's own half is under way."""
    events: list[str] = []
    send, send_late = WorkerConnection.send, RoundSender._send_late_of

    def spy(self: WorkerConnection, message: object) -> None:
        if isinstance(message, RoundMessage) and self.rank == 1:
            items = [item for item in message.inputs if isinstance(item, TransferredInput)]
            late = [item.name for item in items if item.is_late]
            assert all("additional_residual" in name for name in late)
            assert items[len(items) - len(late) :] == [item for item in items if item.is_late]
            events.append(f"round with {'some' if late else 'nothing'} late")
        send(self, message)

    def spy_late(self: RoundSender, run: int) -> None:
        waiting = bool(self._late)
        send_late(self, run)
        if waiting:
            events.append("sent")

    pipe = FAMILY.build()
    run_round = RemoteExecutor.run_round

    def spy_round(self: RemoteExecutor, call: Any) -> None:
        run_round(self, call)
        if self._rank_stages == (0,):
            events.append("own half done")

    with asyncdiff.parallelize(pipe, devices=["cpu"] * 3, controlnet="overlap", **SPLIT):
        generate(pipe)
        monkeypatch.setattr(WorkerConnection, "send", spy)
        monkeypatch.setattr(RoundSender, "_send_late_of", spy_late)
        monkeypatch.setattr(RemoteExecutor, "run_round", spy_round)
        generate(pipe)
    of_step = ["round with some late", "sent", "own half done"]
    assert events == of_step * (len(events) // 3)
    assert len(events) >= 3 * 5


@pytest.mark.usefixtures("spawned")
@pytest.mark.parametrize(
    ("options", "num_devices"), [pytest.param(ONE, 2, id="N1"), pytest.param(SPLIT, 3, id="split")]
)
@pytest.mark.parametrize("controlnet", ["overlap", "ahead"])
def test_failure_of_the_controlnet_ends_the_run_and_says_where(
    orders: Path, options: dict[str, Any], num_devices: int, controlnet: str
) -> None:
    pipe = sabotaged(orders)
    with asyncdiff.parallelize(pipe, devices=["cpu"] * num_devices, controlnet=controlnet, **options):
        expected = generate(pipe, steps=8)
        begin_s = time.monotonic()
        with pytest.raises(WorkerError, match=rf"rank {num_devices - 1} .*failed.*sabotage") as caught:
            generate(pipe, steps=8, callback_on_step_end=ordering_at(3, orders, "fail"))
        assert time.monotonic() - begin_s < ERROR_WITHIN_S
        assert caught.value.rank == num_devices - 1
        assert caught.value.step in (4, 5), "it may have been ahead"
        assert torch.equal(generate(pipe, steps=8), expected)


@pytest.mark.usefixtures("spawned")
def test_interrupt_while_the_controlnet_is_waited_for(orders: Path) -> None:
    pipe = sabotaged(orders)
    with asyncdiff.parallelize(pipe, devices=["cpu"] * 3, controlnet="overlap", **SPLIT):
        expected = generate(pipe)
        with pytest.raises(KeyboardInterrupt):
            generate(pipe, callback_on_step_end=ordering_at(2, orders, "interrupt driver"))
        assert torch.equal(generate(pipe), expected)


@pytest.mark.usefixtures("spawned")
def test_interrupt_in_the_denoiser_while_the_second_half_waits_for_residuals() -> None:
    """What is owed to its worker is sent all the same, or it would wait for ever."""
    pipe = FAMILY.build()
    with asyncdiff.parallelize(pipe, devices=["cpu"] * 3, controlnet="overlap", **SPLIT) as handle:
        expected = generate(pipe)
        groups = handle._division.installations[0].groups
        executors: list[Any] = [group for group in groups.executors if group._rank_stages == (0,)]
        compute = executors[0]._interpreter.compute

        def interrupted(task: Any) -> None:
            executors[0]._interpreter.compute = compute
            raise KeyboardInterrupt

        executors[0]._interpreter.compute = interrupted
        with pytest.raises(KeyboardInterrupt):
            generate(pipe)
        begin_s = time.monotonic()
        assert torch.equal(generate(pipe), expected)
        assert time.monotonic() - begin_s < ERROR_WITHIN_S


@pytest.mark.parametrize("options", [pytest.param(ONE, id="N1")])
def test_death_of_the_controlnet_is_told_in_seconds(orders: Path, options: dict[str, Any]) -> None:
    pipe = sabotaged(orders)
    handle = asyncdiff.parallelize(pipe, devices=["cpu"] * 2, controlnet="ahead", **options)
    pids = [worker.pid for worker in handle.workers]
    generate(pipe)
    begin_s = time.monotonic()
    with pytest.raises(WorkerError, match=r"rank 1 .*step [34]"):
        generate(pipe, callback_on_step_end=ordering_at(2, orders, "die"))
    assert time.monotonic() - begin_s < ERROR_WITHIN_S
    with pytest.raises(ParallelizedError, match="cannot run any more"):
        generate(pipe)
    with pytest.raises(WeightsLostError, match="controlnet"):
        handle.remove()
    wait_until_gone(pids)
    assert type(pipe.unet).forward == pipe.unet.forward.__func__
    assert os.getpid() not in pids
    order(orders, "fail", pid=1)  # of nobody
