"""Devices against each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from asyncdiff.profile import relative_speeds, speeds
from asyncdiff.trace import flatten_inputs
from asyncdiff.weights import dump_skeleton


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, sample: torch.Tensor, prompt: str = "") -> torch.Tensor:
        return self.layer(sample)


def measured(monkeypatch: pytest.MonkeyPatch, devices: list[str], seconds: dict[str, float]) -> Any:
    """With devices of the named kinds, all of them the CPU: the speeds, and where forwards were timed."""
    net = Net()
    timed = []

    def kind(device: torch.device) -> str:
        return devices[len(kinds_asked) - 1] if not kinds_asked.append(device) else ""

    def forward_seconds(module: nn.Module, inputs: Any, device: torch.device, threads: int | None) -> float:
        name = list(seconds)[len(timed)]
        timed.append((name, module is net, module(**inputs.rebuild()).shape))
        return seconds[name]

    kinds_asked: list[torch.device] = []
    monkeypatch.setattr(speeds, "_kind", kind)
    monkeypatch.setattr(speeds, "_forward_seconds", forward_seconds)
    inputs = flatten_inputs(Net.forward, (torch.ones(2, 4),), {"prompt": "a"})
    skeleton = dump_skeleton(net, allow_main=True)
    return relative_speeds(net, skeleton, inputs, ["cpu"] * len(devices), 1), timed


def test_devices_of_one_kind_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured(monkeypatch, ["A", "A"], {}) == (None, [])


def test_each_other_kind_is_measured_once_with_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first takes 2 s, the second kind 4: half the speed."""
    found, timed = measured(monkeypatch, ["A", "B", "A", "B"], {"A": 2.0, "B": 4.0})
    assert found == (1.0, 0.5, 1.0, 0.5)
    assert timed == [("A", True, (2, 4)), ("B", False, (2, 4))]


def test_a_cpu_is_one_kind() -> None:
    net = Net()
    inputs = flatten_inputs(Net.forward, (torch.ones(2, 4),), {})
    skeleton = dump_skeleton(net, allow_main=True)
    assert relative_speeds(net, skeleton, inputs, ["cpu", "cpu"], 1) is None


@pytest.mark.gpu(count=1)
def test_a_gpu_and_a_cpu_are_told_apart() -> None:
    """A large product: no CPU is as fast."""
    net = nn.Module.to(Net(), "cuda:0")
    net.layer = nn.Linear(4096, 4096, device="cuda:0")
    inputs = flatten_inputs(Net.forward, (torch.ones(2048, 4096, device="cuda:0"),), {})
    found = relative_speeds(net, dump_skeleton(net, allow_main=True), inputs, ["cuda:0", "cpu"], None)
    assert found is not None
    assert found[0] == 1.0
    assert 0 < found[1] < 0.5
    assert next(net.parameters()).is_cuda
