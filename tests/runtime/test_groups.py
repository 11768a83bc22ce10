"""Groups of processes that share the batch of a call: bitwise the local executor, and what goes wrong."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from processes import wait_until_gone
from saboteur import ordering_at, sabotage
from tiny_pipelines import generate, tiny_pipeline

import asyncdiff
from asyncdiff.errors import ParallelizedError, WorkerError
from asyncdiff.protocol.messages import KeptInput, RoundMessage, TransferredInput
from asyncdiff.runtime.control import WorkerConnection

NUM_WORKERS = 3
FOUR: dict[str, Any] = {
    "devices": ["cpu"] * 4, "num_stages": 2, "partition": "chain", "guidance": "split", "warmup_steps": 2,
}  # fmt: skip
"""Ranks 0 and 1 are the first group, 2 and 3 the second."""
ERROR_WITHIN_S = 15.0


@pytest.fixture
def orders(tmp_path: Path) -> Path:
    return tmp_path / "orders"


@pytest.mark.usefixtures("spawned")
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.wide)])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"num_stages": 1}, id="N1"),
        pytest.param({"num_stages": 2}, id="N2"),
        pytest.param(
            {"num_stages": 2, "partition": "chain", "forecast": "none", "time_shift": True},
            id="N2-chain-paper",
            marks=pytest.mark.wide,
        ),
        pytest.param({"num_stages": 2, "forecast": "linear"}, id="N2-linear", marks=pytest.mark.wide),
        pytest.param({"num_stages": 1, "stride": 2}, id="N1-S2", marks=pytest.mark.wide),
        pytest.param(
            {"num_stages": 2, "warmup_steps": "auto", "tolerance": 0.05}, id="gate", marks=pytest.mark.wide
        ),
    ],
)
def test_spawned_groups_equal_local_executor(options: dict[str, Any], dtype: torch.dtype) -> None:
    options = {"guidance": "split", "warmup_steps": 2} | options
    num_devices = 2 * (options["num_stages"] + options.get("stride", 1) - 1)
    pipe = tiny_pipeline(dtype=dtype)
    untouched = generate(pipe, num_steps=7)
    with asyncdiff.parallelize(pipe, runtime="local", **options) as handle:
        expected = generate(pipe, num_steps=7)
        handle.set(warmup_steps=7)
        in_order = generate(pipe, num_steps=7)
    with asyncdiff.parallelize(pipe, devices=["cpu"] * num_devices, **options) as handle:
        assert torch.equal(generate(pipe, num_steps=7), expected)
        assert torch.equal(generate(pipe, num_steps=7), expected), "the second picture knows of the first"
        held = handle.last_run.weight_bytes
        assert held[: num_devices // 2] == held[num_devices // 2 :], "each group holds the whole model once"
        assert len(handle.last_run.steps[-1].devices) == num_devices
        handle.set(warmup_steps=7)
        assert torch.equal(generate(pipe, num_steps=7), in_order)
    assert torch.equal(generate(pipe, num_steps=7), untouched)


@pytest.mark.usefixtures("spawned")
def test_plan_decided_by_the_first_call_is_that_of_the_local_executor() -> None:
    pipe = tiny_pipeline()
    with asyncdiff.parallelize(pipe, 2, runtime="local", warmup_steps=2) as handle:
        expected = generate(pipe)
        plan = handle.plan
    with asyncdiff.parallelize(pipe, ["cpu", "cpu"], warmup_steps=2) as handle:
        assert torch.equal(generate(pipe), expected)
        assert handle.plan is not None
        assert plan is not None
        assert (handle.plan.groups, handle.plan.stages) == (plan.groups, plan.stages) == (2, plan.stages)
        assert torch.equal(generate(pipe), expected)
        saved = handle.plan
    with asyncdiff.parallelize(pipe, plan=saved) as handle:
        assert torch.equal(generate(pipe), expected)
        assert len(handle.workers) == 1


@pytest.mark.usefixtures("spawned")
def test_auto_does_not_split_what_devices_cannot_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipeline()
    whole = sum(parameter.nbytes for parameter in pipe.unet.parameters())
    memory = Mock(return_value=Mock(total=2.4 * whole))  # of both devices together: 1.92 wholes of weights
    monkeypatch.setattr("asyncdiff.pipeline.devices.psutil.virtual_memory", memory)
    with asyncdiff.parallelize(pipe, ["cpu", "cpu"]) as handle:
        generate(pipe)
        assert handle.plan is not None
        assert (handle.plan.groups, handle.plan.num_stages) == (1, 2)
    memory.return_value.total = 2.6 * whole
    with asyncdiff.parallelize(pipe, ["cpu", "cpu"]) as handle:
        generate(pipe)
        assert handle.plan is not None
        assert handle.plan.groups == 2


@pytest.mark.usefixtures("spawned")
def test_prompts_cross_once_in_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[int, list[type]] = {}
    send = WorkerConnection.send

    def spy(self: WorkerConnection, message: object) -> None:
        if isinstance(message, RoundMessage) and not message.is_void:
            kinds = [type(item) for item in message.inputs if item.name == "encoder_hidden_states"]
            sent.setdefault(self.rank, []).extend(kinds)
        send(self, message)

    pipe = tiny_pipeline()
    with asyncdiff.parallelize(pipe, **FOUR):
        monkeypatch.setattr(WorkerConnection, "send", spy)
        generate(pipe)
    assert sent[2] == [TransferredInput] + [KeptInput] * (len(sent[2]) - 1)
    assert sent[3] == [TransferredInput] + [KeptInput] * 4


@pytest.mark.usefixtures("spawned")
def test_changed_weights_reach_all_groups() -> None:
    pipes = tiny_pipeline(), tiny_pipeline()
    pictures = []
    for pipe, options in zip(pipes, ({**FOUR, "devices": None}, FOUR), strict=True):
        with asyncdiff.parallelize(pipe, **options):
            before = generate(pipe)
            pipe.fuse_qkv_projections()
            fused = generate(pipe)
        with torch.no_grad():
            pipe.unet.conv_out.bias.add_(1)
        with asyncdiff.parallelize(pipe, **options):
            pictures.append([before, fused, generate(pipe)])
    assert all(map(torch.equal, *pictures))
    assert not torch.equal(pictures[0][0], pictures[0][2])


@pytest.mark.usefixtures("spawned")
@pytest.mark.parametrize(
    ("name", "rank"),
    [
        pytest.param("conv_in", 2, id="first stage"),
        pytest.param("conv_out", 3, id="last stage", marks=pytest.mark.wide),
        pytest.param("conv_out", 1, id="the driver's group"),
    ],
)
def test_exception_in_a_group_ends_the_run_in_all(orders: Path, name: str, rank: int, workers: Any) -> None:
    pipe = tiny_pipeline()
    sabotage(pipe, name, orders)
    pid = workers.connections[rank].pid
    with asyncdiff.parallelize(pipe, **FOUR):
        expected = generate(pipe, num_steps=8)
        with pytest.raises(
            WorkerError, match=rf"rank {rank} \(stage {rank % 2}\) failed.*sabotage"
        ) as caught:
            generate(pipe, num_steps=8, callback_on_step_end=ordering_at(4, orders, "fail", pid))
        assert (caught.value.rank, caught.value.stage) == (rank, rank % 2)
        assert caught.value.step in (5, 6), "a worker may have gone ahead"
        assert torch.equal(generate(pipe, num_steps=8), expected)


@pytest.mark.usefixtures("spawned")
def test_run_that_was_ended_in_one_group_goes_on_in_none(orders: Path) -> None:
    pipe = tiny_pipeline()
    sabotage(pipe, "conv_in", orders)
    denoiser = pipe.unet.forward

    def try_twice(*args: Any, **kwargs: Any) -> Any:
        try:
            return divided(*args, **kwargs)
        except WorkerError:
            return divided(*args, **kwargs)

    with asyncdiff.parallelize(pipe, **FOUR):
        expected = generate(pipe)
        divided = pipe.unet.forward
        assert divided is not denoiser
        pipe.unet.forward = try_twice
        with pytest.raises(ParallelizedError, match="the run cannot go on"):
            generate(pipe, callback_on_step_end=ordering_at(2, orders, "fail"))
        pipe.unet.forward = divided
        assert torch.equal(generate(pipe), expected)


@pytest.mark.usefixtures("spawned")
def test_interrupt_while_all_groups_compute(orders: Path) -> None:
    pipe = tiny_pipeline()
    sabotage(pipe, "conv_in", orders)
    with asyncdiff.parallelize(pipe, **FOUR):
        expected = generate(pipe)
        with pytest.raises(KeyboardInterrupt):
            generate(pipe, callback_on_step_end=ordering_at(2, orders, "interrupt", os.getpid()))
        assert torch.equal(generate(pipe), expected)


@pytest.mark.parametrize(
    "rank",
    [pytest.param(1, id="first group", marks=pytest.mark.wide), pytest.param(2, id="second group")],
)
def test_dead_worker_is_named_and_the_other_group_has_its_weights(rank: int) -> None:
    """No file to read them from: the first group's worker holds what only the second has besides."""
    pipe = tiny_pipeline()
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    plain = generate(pipe)
    handle = asyncdiff.parallelize(pipe, **FOUR)
    generate(pipe)
    pid = handle.workers[rank - 1].pid

    def kill(pipe: object, index: int, timestep: object, kwargs: dict[str, Any]) -> dict[str, Any]:
        if index == 2:
            os.kill(pid, signal.SIGKILL)
        return kwargs

    start = time.monotonic()
    with pytest.raises(
        WorkerError, match=rf"rank {rank} .process {pid} on .*, stage {rank % 2}. ended unexpectedly at step"
    ) as caught:
        generate(pipe, callback_on_step_end=kill)
    assert time.monotonic() - start < ERROR_WITHIN_S
    assert (caught.value.rank, caught.value.stage) == (rank, rank % 2)
    assert caught.value.step in (3, 4)
    with pytest.raises(ParallelizedError, match=r"remove\(\)"):
        generate(pipe)
    handle.remove()
    wait_until_gone([worker.pid for worker in handle.workers])
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.unet.state_dict().items())
    assert torch.equal(generate(pipe), plain)
