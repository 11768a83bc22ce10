"""What crosses between processes: what the graph says, when the schedule says, and nothing else."""

from __future__ import annotations

from collections import Counter
from typing import Any

import psutil
import pytest
import torch
from processes import is_running
from tiny_pipelines import generate, tiny_pipeline

import asyncdiff
from asyncdiff.pipeline.handle import Handle
from asyncdiff.runtime.link import Parcel, Stream
from asyncdiff.schedule.ops import Send, SendPrediction

pytestmark = pytest.mark.usefixtures("spawned")
NUM_STEPS = 6


def expected_bytes(handle: Handle) -> int:
    """The wiring's figures times the schedule's sends, of the only run so far."""
    installation = handle._division.installations[0]
    (state,) = installation._channels.values()
    wiring, stages = state.analysis.wiring, installation.executor._rank_stages
    total = 0
    for round_ in state.schedule.rounds:
        for op in (op for ops in round_.ops for op in ops):
            if isinstance(op, Send):
                total += wiring.num_bytes(op.value.segment, stages[op.to_rank])
            elif isinstance(op, SendPrediction):
                total += wiring.prediction_bytes
    return total


class Tap:
    """Counts what the driver hands to its transport."""

    def __init__(self, handle: Handle, monkeypatch: pytest.MonkeyPatch) -> None:
        self.inputs: Counter[str] = Counter()
        self.state_bytes = 0
        transport = handle._division.installations[0].executor._transport
        self._send = transport.send
        monkeypatch.setattr(transport, "send", self.send)

    def send(self, to_rank: int, parcel: Parcel, tensor: torch.Tensor, spec: Any) -> None:
        if parcel.stream == Stream.INPUT:
            self.inputs[str(parcel.label)] += 1
        elif parcel.stream == Stream.STATE:
            self.state_bytes += tensor.nbytes
        self._send(to_rank, parcel, tensor, spec)


@pytest.mark.parametrize(("num_devices", "options"), [
    (2, {"partition": "chain"}),
    (3, {"partition": "chain"}),
    (3, {"stride": 2, "partition": "chain"}),
    (3, {"stride": 2, "partition": "nested"}),
])  # fmt: skip
def test_bytes_sent_are_what_the_graph_says(
    num_devices: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny_pipeline()
    with asyncdiff.parallelize(pipe, devices=["cpu"] * num_devices, **options) as handle:
        tap = Tap(handle, monkeypatch)
        generate(pipe, num_steps=NUM_STEPS)
        report = handle.last_run
        assert report.bytes_sent == expected_bytes(handle) > 0
        driver_bytes = sum(step.devices[0].bytes_sent for step in report.steps)
        assert driver_bytes == tap.state_bytes


def test_constant_inputs_cross_once_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipeline()
    with asyncdiff.parallelize(pipe, devices=["cpu", "cpu"], partition="chain") as handle:
        generate(pipe, num_steps=NUM_STEPS)
        tap = Tap(handle, monkeypatch)
        generate(pipe, num_steps=NUM_STEPS)
        assert tap.inputs == {"encoder_hidden_states": 1}, "stage 1 does not read the latents"


def test_inputs_written_in_place_are_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def callback(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if index == 2:
            kwargs["prompt_embeds"].mul_(0.5)
        return kwargs

    call = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    pipe = tiny_pipeline()
    with asyncdiff.parallelize(pipe, runtime="local", num_stages=2, partition="chain"):
        expected = generate(pipe, num_steps=NUM_STEPS, **call)
    with asyncdiff.parallelize(pipe, devices=["cpu", "cpu"], partition="chain") as handle:
        tap = Tap(handle, monkeypatch)
        assert torch.equal(generate(pipe, num_steps=NUM_STEPS, **call), expected)
        assert tap.inputs == {"encoder_hidden_states": 2}


def test_no_state_is_kept_of_runs_that_are_over() -> None:
    pipe = tiny_pipeline()
    with asyncdiff.parallelize(pipe, devices=["cpu", "cpu"], partition="chain") as handle:
        installation = handle._division.installations[0]
        executor = installation.executor
        for _ in range(4):
            generate(pipe)
        (last,) = {run for run, _ in installation._channels}
        interpreter = executor._interpreter
        assert len(interpreter._states) == 1
        assert len(interpreter._predictions) == 0
        assert {record.run for record in interpreter._records} == {last}
        assert {run for _, run, _ in executor._sender._last_inputs} == {last}
        assert {record.run for report in executor.reports(None) for record in report.rounds} == {last}


def test_each_process_holds_its_own_weights_only() -> None:
    pipe = tiny_pipeline()
    sizes = {name: tensor.nbytes for name, tensor in pipe.unet.named_parameters()}
    sizes |= {name: tensor.nbytes for name, tensor in pipe.unet.named_buffers()}
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    torch.set_num_threads(2)
    plain = generate(pipe)
    handle = asyncdiff.parallelize(pipe, devices=["cpu"] * 3)
    generate(pipe)
    ((analysis,),) = handle._division.installations[0].structures.analyses.values()
    expected = [sum(sizes[name] for name in analysis.specs[stage].tensors) for stage in range(3)]
    stand_in = next(pipe.unet.parameters()).element_size()  # one element, for `.device`
    held = handle.last_run.weight_bytes
    assert held[0] == expected[0]
    assert [bytes_ - stand_in for bytes_ in held[1:]] == expected[1:]
    live = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in pipe.unet.parameters() if t.device.type != "meta"}  # fmt: skip
    assert expected[0] <= sum(live.values()) <= expected[0] + stand_in
    assert (str(pipe.unet.device), pipe.unet.dtype) == ("cpu", torch.float32)
    assert torch.get_num_threads() == 2
    handle.remove()
    after = pipe.unet.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert torch.get_num_threads() == 2
    assert torch.equal(generate(pipe), plain)


def test_remove_ends_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    pipe = tiny_pipeline()
    handle = asyncdiff.parallelize(pipe, devices=["cpu", "cpu"])
    generate(pipe)
    pid, threads = handle.workers[0].pid, psutil.Process().num_threads()
    assert is_running(pid)
    handle.remove()
    assert not is_running(pid)
    assert psutil.Process().num_threads() < threads
    handle.remove()
