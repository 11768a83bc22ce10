"""The link's figures follow from its times, and the prediction check compares what it says it compares."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from asyncdiff.bench import room
from asyncdiff.bench.link import LinkSpeed, measure_link, measure_links
from asyncdiff.bench.prediction_check import PredictionCheck, Repetition, check_prediction
from asyncdiff.errors import AsyncDiffError, ConfigurationError


def test_latency_and_bandwidth_follow_from_the_times() -> None:
    """1 kB in 1 ms, 2 MB more in 4 ms more."""
    link = LinkSpeed(("cpu", "cpu"), "gloo", ((1_000, 1e-3), (64_000, 2e-3), (2_001_000, 5e-3)))
    assert link.latency_s == 1e-3
    assert link.bandwidth_bytes_per_s == pytest.approx(5e8)
    assert json.loads(json.dumps(link.to_json()))["bandwidth_bytes_per_s"] == pytest.approx(5e8)


@pytest.mark.parametrize(
    ("devices", "pairs"),
    [
        ("ab", ["ab"]),
        ("aa", ["aa"]),
        ("aaaa", ["aa"]),
        ("abc", ["ab", "bc", "ca"]),
    ],
)  # fmt: skip
def test_neighbours_and_the_way_back_are_measured_once(
    devices: str, pairs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncdiff.bench.link.measure_link", lambda one, other: one + other)
    assert measure_links(list(devices)) == tuple(pairs)


def test_a_process_that_waits_for_the_other_ends_with_its_standard_input(tmp_path: Path) -> None:
    """Who started it may be killed before the other one is there."""
    process = subprocess.Popen(
        [sys.executable, "-m", "asyncdiff.bench.link_process", "0", str(tmp_path), "cpu", "cpu"],
        stdin=subprocess.PIPE,
    )
    try:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == 0
    finally:
        process.kill()


def test_link_between_two_processes_is_measured() -> None:
    link = measure_link("cpu", "cpu")
    assert [size for size, _ in link.one_way_s] == [1_000, 64_000, 1_000_000, 4_000_000]
    assert all(0 < seconds < 5 for _, seconds in link.one_way_s)
    assert link.bandwidth_bytes_per_s > 0


def test_a_device_that_is_not_there_is_one_line() -> None:
    with pytest.raises(AsyncDiffError, match="cpu and cuda:63 exchange nothing: ") as raised:
        measure_link("cpu", "cuda:63")
    assert "\n" not in str(raised.value)


def repetition(predicted_s: float, measured_s: float) -> Repetition:
    return Repetition("chain", 0.95, 0.1, (1.0, 1.0), predicted_s, measured_s, 4.0, 5.0)


def test_error_is_the_median_of_the_repetitions() -> None:
    runs = (repetition(1.1, 1.0), repetition(1.0, 1.25), repetition(3.0, 3.0))
    check = PredictionCheck("demo", 64, "float32", ("cpu", "cpu"), 30, 1, (), runs)
    assert [each.error for each in runs] == pytest.approx([0.1, -0.2, 0.0])
    assert check.error == pytest.approx(0.0)
    assert runs[0].in_order_error == pytest.approx(-0.2)
    assert check.to_json()["repetitions"][1]["error"] == pytest.approx(-0.2)
    assert [each.speedup for each in runs] == pytest.approx([5.0, 4.0, 5.0 / 3.0])
    assert check.to_json()["speedup"] == pytest.approx(4.0)
    assert runs[0].row(1, 2)[2:7] == ["1.90", "0.10 ms", "1.100 s", "1.000 s", "+10.0%"]


@pytest.mark.wide
@pytest.mark.timeout(300)
@pytest.mark.parametrize("guidance_refresh", [1, 2])
def test_whole_check_of_the_demo(guidance_refresh: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two spinning threads on a machine that is busy with other tests make a step take seconds.
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    workload: dict[str, Any] = {"arch": "demo", "size": 64, "dtype": "float32", "devices": ("cpu", "cpu")}
    found = check_prediction(**workload, steps=6, runs=1, guidance_refresh=guidance_refresh)
    (run,) = found.repetitions
    assert run.kind in ("chain", "nested")
    assert 0 < run.busy_speed <= 1
    assert len(run.stage_ms) == 2
    # In order is never faster than asynchronously on as many devices as stages, in a prediction.
    assert 0 < run.predicted_s < 1.1 * run.in_order_s / run.busy_speed
    assert run.measured_s > 0
    json.dumps(found.to_json())


def test_what_does_not_fit_is_said_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=0))
    monkeypatch.setattr(room, "psutil", memory)
    with pytest.raises(ConfigurationError, match="This holds 3 whole denoisers of demo in float32"):
        check_prediction(arch="demo", size=64, dtype="float32", devices=("cpu", "cpu"), steps=6, runs=1)


@pytest.mark.parametrize(
    ("module", "options", "said"),
    [
        ("link", ["--devices", "cpu"], "--devices cpu"),
        ("prediction_check", ["--dtype", "int8"], "--dtype int8"),
        ("prediction_check", ["--steps", "1"], "--steps 1"),
        ("prediction_check", ["--runs", "0"], "--runs 0"),
    ],
)
def test_bad_arguments_are_one_line_and_code_2(
    module: str, options: list[str], said: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", f"asyncdiff.bench.{module}", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"Error: {said}")
    assert done.stderr.count("\n") == 1
