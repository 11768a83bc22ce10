"""Modules as graphs, with something in the place of CUDA's that runs on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from captured import Again
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from asyncdiff.stage.graphed import _MOST_GRAPHS, EAGER_CALLS, GraphedForward

CPU = torch.device("cpu")


class Block(nn.Module):
    """Counts how often Python runs through it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.calls = 0

    def forward(
        self, x: torch.Tensor, others: Sequence[Any] = (), *, scale: float = 1.0
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        self.calls += 1
        y = self.linear(x) * scale
        for other in others:
            y = y + other
        return y, {"squared": y * y, "scale": scale}


def graphed(module: nn.Module, capture: Callable[..., Any] | None = None, device: torch.device = CPU) -> Any:
    return GraphedForward(module, device, capture or Again())


CALLS = st.tuples(st.integers(1, 3), st.integers(0, 2), st.sampled_from([1.0, 0.5]), st.booleans())


@settings(max_examples=60, deadline=None)
@given(calls=st.lists(CALLS, min_size=1, max_size=30), seed=st.integers(0, 99))
@torch.no_grad()
def test_equals_the_module_whatever_comes_in_whatever_order(
    calls: list[tuple[int, int, float, bool]], seed: int
) -> None:
    torch.manual_seed(seed)
    block, capture = Block(), Again()
    forward = graphed(block, capture)
    expected, returned = [], []
    for length, num_others, scale, by_name in calls:
        x, others = torch.randn(length, 4), [torch.randn(4) for _ in range(num_others)]
        args, kwargs = ((x, others), {}) if not by_name else ((), {"x": x, "others": tuple(others)})
        expected.append(block(*args, **kwargs, scale=scale))
        returned.append(forward(*args, **kwargs, scale=scale))
    # Only now: what was returned stays as it was, whatever runs later.
    for (y, more), (other_y, other_more) in zip(expected, returned, strict=True):
        assert torch.equal(y, other_y)
        assert torch.equal(more["squared"], other_more["squared"])
        assert more["scale"] == other_more["scale"]
    kinds = [calls.count(kind) for kind in set(calls)]
    assert capture.captured == min(_MOST_GRAPHS, sum(count > EAGER_CALLS for count in kinds))
    assert capture.replayed == sum(max(0, count - EAGER_CALLS) for count in kinds)


@torch.no_grad()
def test_no_more_than_so_many_are_kept() -> None:
    capture = Again()
    forward = graphed(Block(), capture)
    for length in range(1, 2 * _MOST_GRAPHS):
        for _ in range(EAGER_CALLS + 1):
            forward(torch.ones(length, 4))
    assert capture.captured == capture.replayed == _MOST_GRAPHS


class InPlace(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.add_(1) * 2


class HandsOn(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x + 1, x[:1]


class Anything(nn.Module):
    def forward(self, x: torch.Tensor, what: Any) -> torch.Tensor:
        return x + len(what)


@torch.no_grad()
def test_what_a_graph_would_do_otherwise_is_not_captured() -> None:
    def three_times(module: nn.Module, *more: Any, device: torch.device = CPU) -> Again:
        capture = Again()
        forward = graphed(module, capture, device)
        for _ in range(EAGER_CALLS + 3):
            x, other = torch.ones(2), torch.ones(2)
            returned, expected = forward(x, *more), module(other, *more)
            torch.testing.assert_close(returned, expected, rtol=0, atol=0)
            assert torch.equal(x, other)
        return capture

    assert three_times(nn.Tanh()).replayed == 3
    assert three_times(InPlace()).captured == 0
    assert three_times(HandsOn()).captured == 0
    assert three_times(Anything(), {1, 2}).captured == 0
    assert three_times(nn.Tanh(), device=torch.device("meta")).captured == 0


def test_memory_of_a_graph_is_usable_in_and_out_of_inference_mode() -> None:
    block = Block()
    for first, later in ((True, False), (False, True)):
        capture = Again()
        forward = graphed(block, capture)
        for mode in (first, first, first, later, later):
            with torch.inference_mode(mode), torch.no_grad():
                x = torch.randn(2, 4)
                assert torch.equal(forward(x)[0], block(x)[0])
        assert capture.replayed == 3


@torch.no_grad()
def test_a_call_that_cannot_be_captured_says_what_to_do() -> None:
    def refuse(run: Callable[[], Any]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    forward = graphed(Block(), refuse)
    for _ in range(EAGER_CALLS):
        forward(torch.ones(2, 4))
    with pytest.raises(RuntimeError, match=r"A call of Block cannot be captured .*capturing\nLeave cuda_gr"):
        forward(torch.ones(2, 4))


@pytest.mark.gpu
@torch.no_grad()
def test_cuda_graphs_replay_the_module() -> None:
    from asyncdiff.stage.graphed import CudaCapture

    device = torch.device("cuda", 0)
    blocks = [Block().to(device) for _ in range(3)]
    capture = CudaCapture(device)
    forwards = [GraphedForward(block, device, capture) for block in blocks]
    kept = []
    for step in range(2 * EAGER_CALLS + 4):
        for block, forward in zip(blocks, forwards, strict=True):
            x = torch.randn(1 + step % 2, 4, device=device)
            kept.append((forward(x)[0], block(x)[0]))
    for returned, expected in kept:
        torch.testing.assert_close(returned, expected)
    for block in blocks:
        assert block.calls == (2 * EAGER_CALLS + 4) + 2 * (EAGER_CALLS + 1)
