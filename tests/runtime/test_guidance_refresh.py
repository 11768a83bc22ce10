"""Guidance refresh in several processes: bitwise the local executor, and nobody waits who need not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import asyncdiff
from asyncdiff.protocol.messages import RoundInfo
from asyncdiff.runtime.executor import RoundCall
from asyncdiff.runtime.remote import RemoteExecutor
from asyncdiff.tiny import TINY_PIPELINES, TinyCall, generate

pytestmark = pytest.mark.filterwarnings("ignore::asyncdiff.pipeline.user_warning.AsyncDiffWarning")

STEPS = 10


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> list[tuple[RoundInfo, bool]]:
    """Every round that is called, and whether some worker had been told of it before."""
    called: list[tuple[RoundInfo, bool]] = []
    original = RemoteExecutor._told_already

    def spy(self: RemoteExecutor, call: RoundCall) -> frozenset[int]:
        ranks = original(self, call)
        called.append((call.info, bool(ranks)))
        return ranks

    monkeypatch.setattr(RemoteExecutor, "_told_already", spy)
    return called


def options_of(num_stages: int, k: int) -> dict[str, Any]:
    return {"num_stages": num_stages, "partition": "chain", "guidance_refresh": k}


@pytest.mark.usefixtures("spawned")
@pytest.mark.parametrize(
    ("family", "num_stages", "k"),
    [
        ("sd15", 2, 2),
        pytest.param("sd3", 3, 4, marks=pytest.mark.wide),
        ("wan-2.1", 2, 2),
        pytest.param("sd15", 3, 3, marks=pytest.mark.wide),
        pytest.param("sdxl", 2, 4, marks=pytest.mark.wide),
        pytest.param("controlnet-sd15", 2, 2, marks=pytest.mark.wide),
        pytest.param("qwen-image", 3, 4, marks=pytest.mark.wide),
        pytest.param("wan-2.2", 2, 2, marks=pytest.mark.wide),
    ],
)
def test_processes_are_bitwise_the_local_executor(family: str, num_stages: int, k: int) -> None:
    stand_in = TINY_PIPELINES[family]
    pipe, options = stand_in.build(), options_of(num_stages, k)
    calls = [TinyCall(steps=STEPS), TinyCall(steps=STEPS, seed=1, large=True)]
    alone = generate(stand_in, pipe, calls[0])
    with asyncdiff.parallelize(pipe, runtime="local", **options):
        expected = [generate(stand_in, pipe, call) for call in calls]
    with asyncdiff.parallelize(pipe, ["cpu"] * num_stages, **options):
        for call, picture in zip([*calls, calls[0]], [*expected, expected[0]], strict=True):
            assert torch.equal(generate(stand_in, pipe, call), picture)
    assert not torch.equal(expected[0], alone)
    assert torch.equal(generate(stand_in, pipe, calls[0]), alone)


@pytest.mark.usefixtures("spawned")
def test_a_worker_begins_the_next_round_while_the_driver_is_at_the_other_half(
    rounds: list[tuple[RoundInfo, bool]],
) -> None:
    """Two stages, k = 4, one step of warm-up: steps 4 and 8 are refreshed. In the rounds of steps 3 and 7
    the driver evaluates both halves, in those of 4 and 8 the worker. Every round that a worker computes in,
    the first after warm-up apart, it has been told of before its call."""
    pipe = TINY_PIPELINES["sd15"].build()
    with asyncdiff.parallelize(pipe, ["cpu", "cpu"], **options_of(2, 4)):
        generate(TINY_PIPELINES["sd15"], pipe, TinyCall(steps=STEPS))
    told = {(info.channel, info.first_step): is_told for info, is_told in rounds}
    assert list(told) == [
        ((0, 1), 0), ((0, 0), 0), *(((0, 1), step) for step in (1, 2, 3)), ((0, 0), 3), ((0, 1), 4),
        ((0, 0), 4), *(((0, 1), step) for step in (5, 6, 7)), ((0, 0), 7), ((0, 1), 8), ((0, 0), 8),
        ((0, 1), 9), ((0, 1), 10),
    ]  # fmt: skip
    assert {key for key, is_told in told.items() if not is_told} == {
        ((0, 1), 0), ((0, 0), 0), ((0, 1), 1),  # nothing to compare with yet
        ((0, 0), 3), ((0, 0), 7),  # the worker only receives
    }  # fmt: skip


@pytest.mark.usefixtures("spawned")
def test_of_two_calls_a_round_without_a_second_one_is_foreseen(rounds: list[tuple[RoundInfo, bool]]) -> None:
    """As above, but the second call's rounds come when the first has returned. Nobody is told of the round
    after a step that has one."""
    pipe = TINY_PIPELINES["wan-2.1"].build()
    with asyncdiff.parallelize(pipe, ["cpu", "cpu"], **options_of(2, 4)):
        generate(TINY_PIPELINES["wan-2.1"], pipe, TinyCall(steps=STEPS))
    first, second = (
        [(info.first_step, is_told) for info, is_told in rounds if info.channel == channel]
        for channel in dict.fromkeys(info.channel for info, _ in rounds)
    )
    assert [step for step, _ in first] == list(range(STEPS))
    assert [step for step, is_told in first if is_told] == [2, 3, 6, 7]
    assert second == [(step, False) for step in (0, 3, 4, 7, 8)]
