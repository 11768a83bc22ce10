"""`asyncdiff doctor` says what is there and what works."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from asyncdiff.cli.app import build_app
from asyncdiff.cli.doctor import missing_packages, run_checks
from asyncdiff.cli.failures import run
from asyncdiff.launch.probe import ProbeResult, _run_all, round_trip

CPU = [{"name": "cpu", "kind": "cpu", "cores": 2}]


def test_doctor_writes_what_it_finds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "doctor.json"
    assert run(build_app(), ["doctor", "--json", str(file)]) == 0
    findings = json.loads(file.read_text())
    assert findings["packages"]["torch"]
    assert findings["devices"][0]["kind"] == "cpu"
    assert findings["devices"][0]["cores"] >= 1
    works = {check["name"]: check["works"] for check in findings["checks"]}
    assert works["spawn on CPUs (gloo)"]
    assert works["torchrun"]
    printed = capsys.readouterr().out
    assert all(name in printed for name in works)


def test_nothing_is_missing_in_the_pinned_environment() -> None:
    assert missing_packages() == []


def test_without_torch_nothing_is_tried() -> None:
    def fail(*_: object) -> None:
        raise AssertionError("something was tried")

    (check,) = run_checks(CPU, ["torch>=2.13"], fail)
    assert not check.works


def test_nothing_usable_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("asyncdiff.cli.doctor.missing_packages", lambda: ["torch>=2.13"])
    assert run(build_app(), ["doctor"]) == 1
    assert "pip install 'torch>=2.13'" in capsys.readouterr().out


def test_probe_reports_a_device_that_is_not_there() -> None:
    result = round_trip("gloo", ("cpu", "cuda:63"), timeout_s=60)
    assert not result.works
    assert result.why_not


def test_probe_that_hangs_ends_within_its_timeout() -> None:
    result = _run_all([[sys.executable, "-c", "import time; time.sleep(60)"]], 0.5)
    assert result == ProbeResult(False, result.seconds, "no answer within 0.5 s")
    assert result.seconds < 10
