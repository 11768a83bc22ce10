"""What a device for the ControlNet brings: the command, and what it makes of its measurements."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from asyncdiff.bench.controlnet import MEASURED, WAYS, ControlNetBenchmark, Repetition, Way, markdown
from asyncdiff.bench.readme import replace_measured


def repetition(serial_ms: float, ahead_ms: float, busy_speed: float = 1.0) -> Repetition:
    serial, ahead = WAYS[0].title, Way(1, 1, "ahead").title
    times = {serial: serial_ms, ahead: ahead_ms}
    return Repetition(60.0, 20.0, 30.0, 10.0, busy_speed, times, times)


def benchmark(*repetitions: Repetition) -> ControlNetBenchmark:
    return ControlNetBenchmark("a", 8, "float32", ("cpu", "cpu"), 10, 7, (), repetitions)


def test_ways_are_told_apart() -> None:
    assert len({way.title for way in WAYS}) == len(WAYS)
    assert max(way.num_devices for way in WAYS) == 3
    assert {way.num_devices for way in MEASURED} == {1, 2}


def test_ratios_are_taken_within_repetitions() -> None:
    result = benchmark(repetition(100.0, 50.0), repetition(300.0, 100.0), repetition(200.0, 80.0))
    ahead = Way(1, 1, "ahead")
    assert result.speedup(ahead, WAYS[0], measured=True) == 2.5
    assert result.measured_ms(ahead) == 80.0
    assert result.speedup(Way(1, 2, "ahead"), WAYS[0], measured=False) is None
    assert result.row(ahead)[1:] == ["2", "80.00 ms", "2.50x", "2.50x", "80.00 ms", "2.50x"]


@pytest.mark.parametrize(("busy_speed", "ceiling"), [(1.0, 100 / 70), (0.6, 100 / 90)])
def test_ceiling_is_both_at_once_on_this_machine(busy_speed: float, ceiling: float) -> None:
    """The denoiser's 60 ms and the driver's 10, longer while the ControlNet's 30 are under way."""
    assert benchmark(repetition(100.0, 50.0, busy_speed)).ceiling == pytest.approx(ceiling)


@pytest.mark.wide
def test_command_measures_and_writes(tmp_path: Path) -> None:
    file = tmp_path / "controlnet.json"
    subject = ["--arch", "controlnet-demo", "--size", "64", "--dtype", "float32"]
    options = [*subject, "--runs", "1", "--steps", "5"]
    command = [sys.executable, "-m", "asyncdiff.bench.controlnet", *options, "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=110)
    assert done.returncode == 0, done.stderr
    written = json.loads(file.read_text())
    assert all(written["ways"][way.title]["measured_ms"] > 0 for way in MEASURED)
    assert all(each["predicted_ms"] > 0 for each in written["ways"].values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--arch", "sd15"], "has no ControlNet"),
        (["--arch", "nothing"], "is not known"),
        (["--devices", "cpu"], "must be two"),
        (["--steps", "3"], "--steps 3"),
    ],
)
def test_bad_usage_is_one_line_and_code_2(options: list[str], message: str) -> None:
    command = [sys.executable, "-m", "asyncdiff.bench.controlnet", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_table_fills_the_page() -> None:
    page = Path(__file__).parents[2] / "docs" / "controlnet.md"
    result = benchmark(repetition(100.0, 50.0))
    filled = replace_measured(page.read_text(encoding="utf-8"), markdown(result))
    assert (
        "| whole; ControlNet ahead, on its own | 2 | 50.00 ms | 2.00x | 2.00x | 50.00 ms | 2.00x |" in filled
    )
    assert replace_measured(filled, markdown(result)) == filled
