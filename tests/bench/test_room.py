"""Benchmarks that do not fit into memory are refused before anything is built."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from asyncdiff.bench import room
from asyncdiff.bench.architectures import architecture_named, build_denoiser
from asyncdiff.bench.room import check_room
from asyncdiff.bench.workload import Workload
from asyncdiff.errors import ConfigurationError

DEMO = Workload("demo", None, 64, "bfloat16")
BYTES = sum(p.nbytes for p in build_denoiser(architecture_named("demo"), torch.bfloat16).parameters())


def available(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    memory = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=num_bytes))
    monkeypatch.setattr(room, "psutil", memory)


def test_so_many_copies_as_cpus_are_named_must_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    available(monkeypatch, 3 * BYTES)
    check_room(DEMO, ["cpu"] * 3)
    with pytest.raises(ConfigurationError, match=r"^This holds 4 whole denoisers of demo in bfloat16"):
        check_room(DEMO, ["cpu"] * 4)


@pytest.mark.parametrize("workload", [DEMO, Workload(None, "me/model", None, "auto")])
def test_nothing_is_said_of_gpus_and_of_models(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    available(monkeypatch, 0)
    check_room(workload, ["cuda:0", "cuda:1"] if workload is DEMO else ["cpu", "cpu"])
