"""`asyncdiff bench`: what it refuses before anything starts, and one run to the end."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from asyncdiff.cli.app import build_app
from asyncdiff.cli.failures import run

BENCH = [sys.executable, "-m", "asyncdiff", "bench"]

# (arguments, what the one line must contain)
BAD: list[tuple[str, str]] = [
    ("--arch sd15 --model demo", "--arch sd15 and --model demo: give one of them"),
    ("--arch sd15 --prompt cat", "--prompt is for --model"),
    ("--model demo --compare", "--compare is for --arch"),
    ("--model ./nowhere", "no such folder"),
    ("--arch sd99 --devices cpu,cpu", "--arch sd99 is not known. Use one of demo,"),
    ("--arch wan-2.2 --devices cpu,cpu", "--arch wan-2.2 is not known"),
    ("--size 250", "--size 250"),
    ("--dtype int8", "bfloat16"),
    ("--runs 0", "--runs 0"),
    ("--warmup-steps 0", "--warmup-steps 0"),
    ("--steps 4 --devices cpu,cpu --configs 2x1", "--steps 4: too few to reach the steady state of 2x1"),
    ("--steps 5 --warmup-steps 2 --devices cpu,cpu --configs 2x1", "Use 7 or more"),
    ("--steps 7 --devices cpu,cpu", "steady state of 1x2"),
    ("--devices 1", "--devices 1: must be 2 or more"),
    ("--devices cpu", "--devices 1: must be 2 or more"),
    ("--devices cpu,gpu", "'gpu' is no device"),
    ("--configs 2", "'2' is no configuration"),
    ("--configs 3x1", "3x1 takes 3 devices"),
    ("--devices 4 --configs 2x1,4x2", "4x2 takes 5 devices"),
    ("--json bench.csv", ".json"),
    ("--csv bench.json", ".csv"),
    ("--html bench.txt", ".html"),
    ("--html missing/bench.html", "folder missing does not exist"),
    ("--runs 2 step --devices cpu,cpu", "asyncdiff bench step --runs"),
]


@pytest.mark.parametrize(("arguments", "expected"), BAD, ids=[arguments for arguments, _ in BAD])
def test_bad_usage_is_one_line_and_code_2(
    arguments: str,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ASYNCDIFF_DEBUG", raising=False)
    code = run(build_app(), ["bench", *arguments.split()])
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert captured.out == ""
    errors = [line for line in captured.err.splitlines() if not line.startswith(("Measuring ", "Loading "))]
    assert len(errors) == 1, captured.err
    assert errors[0].startswith("Error: ")
    assert expected in errors[0]
    assert not list(tmp_path.iterdir())


def test_html_without_matplotlib_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(build_app(), ["bench", "--html", str(tmp_path / "bench.html")]) == 2
    assert "pip install 'asyncdiff[bench]'" in capsys.readouterr().err


def test_help_shows_the_options_and_the_command_below() -> None:
    done = subprocess.run([*BENCH, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    for expected in ("--arch", "--model", "--configs", "--compare", "--html", "step"):
        assert expected in done.stdout


def bench(folder: Path, arguments: str, timeout_s: float = 280) -> subprocess.CompletedProcess[str]:
    # Spinning threads on a machine that is busy with other tests make a step take seconds.
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
    return subprocess.run(
        [*BENCH, *arguments.split()],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        cwd=folder,
        env=environment,
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_measures_and_writes_what_it_measured(tmp_path: Path) -> None:
    arguments = "--arch demo --size 64 --dtype float32 --devices cpu,cpu --configs 2x1 --steps 8 --runs 2"
    done = bench(tmp_path, f"{arguments} --json b.json --csv b.csv --html b.html")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("Measuring demo, 64 px, float32, on cpu, cpu: in order, 2x1 ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.csv", "b.html", "b.json"]
    figures = json.loads((tmp_path / "b.json").read_text())
    check_figures(figures, ["2x1"], num_runs=2)
    assert figures["command"] == f"asyncdiff bench {arguments} --json b.json --csv b.csv --html b.html"
    rows = list(csv.DictReader((tmp_path / "b.csv").open()))
    for name, kind in (("in order", "whole run"), ("2x1", "whole run"), ("2x1", "steady step")):
        (row,) = [row for row in rows if (row["configuration"], row["kind"]) == (name, kind)]
        of = figures["in_order"] if name == "in order" else figures["configurations"][0]
        spread = of["timing"]["run_s" if kind == "whole run" else "step_s"]
        assert float(row["seconds_median"]) == spread["median"]
    assert figures["command"] in (tmp_path / "b.html").read_text()
    assert "2x1" in done.stdout


@pytest.mark.wide
@pytest.mark.timeout(600)
def test_all_configurations_of_three_devices_on_the_bundled_pipeline(tmp_path: Path) -> None:
    done = bench(
        tmp_path, "--model demo --prompt square --devices cpu,cpu,cpu --steps 16 --runs 1 --json b.json", 580
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "b.json").read_text())
    check_figures(figures, ["2x1", "1x2", "3x1", "2x2", "1x3"], num_runs=1)
    assert [limit["devices"] for limit in figures["limits"]] == [2, 3]


def check_figures(figures: dict[str, Any], names: list[str], num_runs: int) -> None:
    """What can be known beforehand."""
    assert [each["name"] for each in figures["configurations"]] == names
    assert figures["skipped"] == []
    whole = figures["in_order"]
    for each in figures["configurations"]:
        assert each["bytes_per_step"] == pytest.approx(each["expected_bytes_per_step"], rel=1e-12) != 0
        shares = [device["weight_share"] for device in each["devices"]]
        copies = each["stride"] - 1  # of the last stage, beyond the first
        assert len(shares) == each["num_stages"] + copies
        least = 1 + copies * min(shares)
        assert least <= sum(shares) < 1.1 * (1 + copies * max(shares))
        for device, share in zip(each["devices"], shares, strict=True):
            assert device["weight_bytes"] == pytest.approx(share * whole["weight_bytes"])
            assert device["resident_bytes"] > device["weight_bytes"]
        for spread in (each["timing"]["run_s"], each["timing"]["step_s"], each["step_speedup"]):
            assert 0 < spread["lowest"] <= spread["median"] <= spread["highest"]
            assert len(spread["per_run"]) == num_runs
        # A step takes as long as its device computes, waits, sends, and does nothing of these.
        step_ms = 1e3 * each["timing"]["step_s"]["highest"]
        for device in each["devices"]:
            assert 0 < device["compute_ms"] <= step_ms
        assert {span["rank"] for span in each["timeline"]} == set(range(len(each["devices"])))
        steps_s = figures["steps"] * each["timing"]["step_s"]["lowest"]
        assert each["timing"]["run_s"]["highest"] > 0.5 * steps_s


@pytest.mark.wide
@pytest.mark.timeout(300)
def test_interrupt_ends_everything_with_one_line(tmp_path: Path) -> None:
    command = [*BENCH, "--arch", "demo", "--size", "64", "--dtype", "float32", "--devices", "cpu,cpu"]
    process = subprocess.Popen(
        [*command, "--configs", "2x1", "--steps", "900", "--json", "b.json"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        preexec_fn=_heed_interrupts,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("2x1, run 1 of 3"):
            break
    time.sleep(1.0)
    os.kill(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == "Interrupted.\n"
    assert not (tmp_path / "b.json").exists()  # and no process is left: the fixture for all tests looks


def _heed_interrupts() -> None:
    """What a shell starts in the background ignores Ctrl-C, and so do its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
