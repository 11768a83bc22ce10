"""Timing a denoiser's calls."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from asyncdiff.graph import BlockKey
from asyncdiff.profile import add_up, time_calls
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


def test_what_lies_in_a_call_adds_up_to_it() -> None:
    """By hand: 10 s of which the parts make 8, and 2 s of them (scaled: 2.5) with parts of 5."""
    outer, left, right, deep, other = (BlockKey(name) for name in ("outer", "left", "right", "deep", "other"))
    parents = {outer: None, left: outer, right: outer, deep: right, other: None}
    found = add_up({outer: 10.0, left: 6.0, right: 2.0, deep: 5.0, other: 3.0}, parents)
    assert found == {outer: 10.0, left: 7.5, right: 2.5, deep: 2.5, other: 3.0}


def test_parts_of_what_was_not_timed_are_as_they_were() -> None:
    outer, inner = BlockKey("outer"), BlockKey("inner")
    assert add_up({inner: 2.0}, {outer: None, inner: outer}) == {inner: 2.0}
    assert add_up({outer: 1.0, inner: 0.0}, {outer: None, inner: outer}) == {outer: 1.0, inner: 0.0}


class Nested(nn.Module):
    """Sleeps 20 ms by itself and 30 in a part."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Sleeper(0.03)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        return self.part(sample)


def test_a_call_takes_as_long_as_itself_and_what_lies_in_it() -> None:
    """Also the whole forward, by the empty path; asked for alone, a call is the same."""
    net = Nested()
    whole, part = BlockKey(""), BlockKey("part")
    inputs = flatten_inputs(Nested.forward, (torch.zeros(1),), {})
    seconds = time_calls(net, inputs, [whole, part], CPU, runs=3)
    assert seconds[part] >= 0.03
    assert seconds[whole] - seconds[part] >= 0.02
    assert time_calls(net, inputs, [whole], CPU, runs=1)[whole] >= 0.05


def test_a_slow_run_of_one_part_does_not_count_elsewhere() -> None:
    """One forward of three in which the part takes long: neither it nor what calls it does, by medians."""

    class Once(Sleeper):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            time.sleep(1.0 if self.calls == 2 else 0.01)
            return x

    net = Nested()
    net.part = Once(0.0)
    whole, part = BlockKey(""), BlockKey("part")
    inputs = flatten_inputs(Nested.forward, (torch.zeros(1),), {})
    seconds = time_calls(net, inputs, [whole, part], CPU, runs=3)
    assert seconds[part] < 0.5
    assert seconds[whole] < 0.5
