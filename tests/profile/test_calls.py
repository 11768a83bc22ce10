"""Timing a denoiser's calls."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from asyncdiff.graph import BlockKey
from asyncdiff.profile import time_calls
from asyncdiff.trace import flatten_inputs

CPU = torch.device("cpu")


class Sleeper(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        time.sleep(self.seconds * self.calls if self.calls <= 2 else self.seconds)
        return x


class Net(nn.Module):
    """Calls one of its modules twice."""

    def __init__(self) -> None:
        super().__init__()
        self.short, self.long = Sleeper(0.002), Sleeper(0.02)
        self.threads: list[int] = []

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        self.threads.append(torch.get_num_threads())
        return self.short(self.long(self.short(sample)))


KEYS = [BlockKey("short", 0), BlockKey("short", 1), BlockKey("long", 0)]


def inputs_of(net: Net) -> object:
    return flatten_inputs(type(net).forward, (torch.zeros(1),), {})


def test_each_call_is_timed_by_itself() -> None:
    net = Net()
    seconds = time_calls(net, inputs_of(net), KEYS, CPU, runs=3)
    assert set(seconds) == set(KEYS)
    assert seconds[KEYS[2]] >= 0.02  # sleeping is never shorter; how much longer is the machine's business
    assert all(seconds[key] >= 0.002 for key in KEYS)
    assert net.long.calls == 4  # one untimed


def test_only_the_named_calls_are_returned() -> None:
    net = Net()
    assert set(time_calls(net, inputs_of(net), KEYS[:1], CPU, runs=1)) == {KEYS[0]}


def test_module_and_threads_are_as_before() -> None:
    net = Net()
    own = net.long.forward
    net.long.forward = own
    before = torch.get_num_threads()
    time_calls(net, inputs_of(net), KEYS, CPU, runs=1, threads=before + 1)
    assert torch.get_num_threads() == before
    assert net.threads == [before + 1] * 2
    assert net.long.forward is own
    assert "forward" not in vars(net.short)


def test_restored_after_a_forward_that_raises() -> None:
    net = Net()
    net.long.seconds = -1.0
    with pytest.raises(ValueError, match="sleep length"):
        time_calls(net, inputs_of(net), KEYS, CPU, runs=1)
    assert "forward" not in vars(net.short)
    assert "forward" not in vars(net.long)
