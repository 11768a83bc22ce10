"""`cuda_graphs=True`: every device captures its own blocks and replays them, and nothing else.

Without a GPU something that runs the blocks again stands in for CUDA's graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from captured import Again

import asyncdiff
from asyncdiff.errors import ConfigurationError
from asyncdiff.pipeline import front_door
from asyncdiff.stage import BlockExecution, replica
from asyncdiff.tiny import TINY_PIPELINES, TinyCall, generate

CALL = TinyCall(steps=8)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Again]:
    """Those that handles make in the test, one per stage, on CPUs too."""
    made: list[Again] = []

    def capture(device: torch.device) -> Again:
        made.append(Again())
        return made[-1]

    def execution(placement: Any, wish: Any) -> BlockExecution:
        return BlockExecution(wish.compile, wish.cuda_graphs)

    monkeypatch.setattr(replica, "CudaCapture", capture)
    monkeypatch.setattr(front_door, "_execution", execution)
    return made


def check_graphs(name: str, captures: list[Again], **changes: Any) -> None:
    """The same picture, twice, and every stage replays what it has captured."""
    family = TINY_PIPELINES[name]
    pipe = family.build()
    with asyncdiff.parallelize(pipe, num_stages=2, **changes):
        expected = generate(family, pipe, CALL)
    captures.clear()
    with asyncdiff.parallelize(pipe, num_stages=2, cuda_graphs=True, **changes):
        for _ in range(2):
            assert torch.equal(generate(family, pipe, CALL), expected)
    assert all(capture.replayed > capture.captured > 0 for capture in captures)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux", "wan-2.1"])
def test_stages_replay_their_blocks(name: str, captures: list[Again]) -> None:
    check_graphs(name, captures)


@pytest.mark.wide
@pytest.mark.parametrize("name", sorted(TINY_PIPELINES))
def test_stages_of_every_family_replay_their_blocks(name: str, captures: list[Again]) -> None:
    check_graphs(name, captures)


def test_compiled_blocks_are_captured(captures: list[Again], monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Callable[..., Any]] = []

    def fake_compile(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", fake_compile)
    check_graphs("sd15", captures, compile=True)
    assert compiled


def test_changed_weights_are_captured_anew(captures: list[Again]) -> None:
    family = TINY_PIPELINES["sd15"]
    pipe = family.build()
    with asyncdiff.parallelize(pipe, num_stages=2, cuda_graphs=True):
        before = generate(family, pipe, CALL)
        pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
        changed = generate(family, pipe, CALL)
    with asyncdiff.parallelize(pipe, num_stages=2):
        expected = generate(family, pipe, CALL)
    assert torch.equal(changed, expected)
    assert not torch.equal(changed, before)


def test_other_devices_are_refused() -> None:
    pipe = TINY_PIPELINES["sd15"].build()
    with pytest.raises(ConfigurationError, match="'cpu' is not a CUDA device"):
        asyncdiff.parallelize(pipe, devices=["cpu", "cpu"], cuda_graphs=True)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_graphs_on_a_gpu(name: str) -> None:
    family = TINY_PIPELINES[name]
    pipe = family.build().to("cuda:0")
    with asyncdiff.parallelize(pipe, num_stages=2):
        expected = generate(family, pipe, CALL)
    for devices in ({}, {"devices": ["cuda:0", "cuda:0"]}):
        with asyncdiff.parallelize(pipe, num_stages=2, cuda_graphs=True, **devices):
            for _ in range(2):
                torch.testing.assert_close(generate(family, pipe, CALL), expected, rtol=1e-3, atol=1e-3)
