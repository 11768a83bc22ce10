"""What start-up is said to take is what processes of known size take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from asyncdiff.bench.process_memory import ProcessMemory
from asyncdiff.bench.start_up import ALLOWED_BYTES, WAYS, Start, StartedProcess, measure_start, write_folder


def test_weights_count_where_they_are() -> None:
    peak, after = ProcessMemory(10, 8), ProcessMemory(9, 7)
    assert StartedProcess(0, "cpu", 4, peak, after).beside_weights_bytes == 6
    assert StartedProcess(1, "cuda:1", 4, peak, after).beside_weights_bytes == 10
    start = Start("torchrun", (StartedProcess(0, "cpu", 4, peak, after),))
    assert json.loads(json.dumps(start.to_json()))["processes"][0]["beside_weights_bytes"] == 6


@pytest.mark.wide
@pytest.mark.timeout(400)
@pytest.mark.parametrize("way", WAYS)
def test_every_process_of_every_way_is_seen(way: str, tmp_path: Path) -> None:
    folder = write_folder("demo", "float32", tmp_path)
    start = measure_start(way, folder, arch="demo", dtype="float32", size=64, devices=["cpu", "cpu"], steps=2)
    assert [process.rank for process in start.processes] == [0, 1]
    held = [process.weight_bytes for process in start.processes]
    assert all(0 < each < folder.denoiser_bytes for each in held)
    assert folder.denoiser_bytes <= sum(held) < 1.1 * folder.denoiser_bytes
    for process in start.processes:
        assert 100e6 < process.after.private <= process.peak.private <= process.peak.resident
        assert process.beside_weights_bytes < ALLOWED_BYTES
