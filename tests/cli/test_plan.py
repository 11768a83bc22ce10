"""`asyncdiff plan`: predictions that can be worked out by hand, the choice among them, and its file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import asyncdiff
from asyncdiff.bench.link import LinkSpeed
from asyncdiff.cli.app import build_app
from asyncdiff.cli.failures import run
from asyncdiff.demo import DEMO_MODEL, load_demo_pipeline

DEMO = ["--arch", "demo", "--dtype", "float32", "--devices", "cpu,cpu"]


def planned(folder: Path, *options: str) -> dict[str, Any]:
    """What `--json` says."""
    file = folder / "predicted.json"
    assert run(build_app(), ["plan", *options, "--json", str(file)]) == 0
    return json.loads(file.read_text())


def chosen(found: dict[str, Any]) -> dict[str, Any]:
    (candidate,) = [each for each in found["candidates"] if each["is_chosen"]]
    return candidate


def named(found: dict[str, Any]) -> dict[tuple[int, int, int], dict[str, Any]]:
    """Those of one group."""
    return {
        (c["num_stages"], c["stride"], c["warmup_steps"]): c for c in found["candidates"] if c["groups"] == 1
    }


@pytest.fixture(scope="module")
def three_devices(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The demo's U-Net on up to three devices, transfers for nothing, two lengths of warm-up."""
    return planned(
        tmp_path_factory.mktemp("three"), "--arch", "demo", "--dtype", "float32", "--devices", "cpu,cpu,cpu",
        "--latency-us", "0", "--bandwidth-gbs", "1e9", "--steps", "30", "--warmup-steps", "1,5",
    )  # fmt: skip


def test_every_division_is_there(three_devices: dict[str, Any]) -> None:
    found = named(three_devices)
    divisions = [(n, s) for n in range(1, 4) for s in range(1, 4) if 2 <= n + s - 1 <= 3]
    assert found.keys() == {(1, 1, 1)} | {(n, s, w) for n, s in divisions for w in (1, 5)}
    for (n, s, _), each in found.items():
        assert len(each["devices"]) == n + s - 1
        assert len(each["weight_bytes"]) == n
        assert each["speedup"] == pytest.approx(found[1, 1, 1]["total_s"] / each["total_s"])


def test_time_is_that_of_the_schedule(three_devices: dict[str, Any]) -> None:
    """Two stages: w steps of both, the rest of the larger one, and last only what predicts."""
    found = named(three_devices)
    whole = found[1, 1, 1]["total_s"] / 30
    for w in (1, 5):
        steady = (found[2, 1, w]["total_s"] - w * whole) / (30 - w)
        assert steady == pytest.approx(whole / 2, rel=0.06)  # as balanced as blocks allow, glue on both
    # A chain: no weights shared, the whole on each of S devices; nothing crosses but predictions.
    whole_on_two = found[1, 2, 1]
    assert whole_on_two["total_s"] == pytest.approx(whole * (1 + 15), rel=0.01)
    assert sum(found[2, 1, 1]["weight_bytes"]) < 1.1 * whole_on_two["weight_bytes"][0]


def test_refreshed_guidance_is_compared_if_asked_for(tmp_path: Path) -> None:
    found = planned(tmp_path, *DEMO, "--steps", "30", "--guidance-refresh", "2,4")
    assert {each["guidance_refresh"] for each in planned(tmp_path, *DEMO)["candidates"]} == {1}
    seconds = {
        (each["guidance_refresh"], each["num_stages"]): each["total_s"]
        for each in found["candidates"] if each["groups"] == each["stride"] == 1
    }  # fmt: skip
    assert seconds.keys() == {(k, n) for k in (1, 2, 4) for n in (1, 2)}
    for n in (1, 2):
        assert seconds[4, n] < seconds[2, n] < seconds[1, n]


def test_staleness_is_the_method_s(three_devices: dict[str, Any]) -> None:
    """N stages: N - 1 steps back; S copies of everything: the last is S - 1 steps ahead of its latents."""
    found = named(three_devices)
    assert [found[n, 1, 1]["staleness"] for n in (1, 2, 3)] == [0, 1, 2]
    assert [found[1, s, 1]["staleness"] for s in (2, 3)] == [1, 2]
    assert found[1, 3, 1]["read_staleness"] == 0
    assert found[2, 1, 1]["read_staleness"] == 1


def test_fastest_is_chosen(three_devices: dict[str, Any]) -> None:
    assert chosen(three_devices)["total_s"] == min(each["total_s"] for each in three_devices["candidates"])


def test_choice_is_explained_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(tmp_path, *DEMO)
    sentence = found["reason"]
    assert sentence.startswith("Chosen: 2 stages on 2 devices")
    assert sentence.endswith("% longer.")
    assert capsys.readouterr().out.splitlines()[-1] == sentence
    assert found["environment"]["packages"]["torch"]


def test_very_stale_ways_are_chosen_only_if_asked_for(tmp_path: Path) -> None:
    options = [
        "--arch",
        "demo",
        "--devices",
        ",".join(["cpu"] * 6),
        "--latency-us",
        "0",
        "--bandwidth-gbs",
        "1e9",
    ]
    assert chosen(planned(tmp_path, *options))["staleness"] <= 5
    assert chosen(planned(tmp_path, *options, "--max-staleness", "50"))["staleness"] > 5


def test_staleness_limit_is_kept(tmp_path: Path) -> None:
    found = planned(tmp_path, *DEMO, "--max-staleness", "0")
    assert chosen(found)["staleness"] == 0
    assert (chosen(found)["groups"], chosen(found)["num_stages"]) == (2, 1)


def test_two_groups_are_listed_first_and_take_what_half_a_batch_takes(tmp_path: Path) -> None:
    found = planned(tmp_path, *DEMO, "--latency-us", "0", "--bandwidth-gbs", "1e9", "--steps", "30")
    in_order, shared, *others = found["candidates"]
    assert (shared["groups"], shared["num_stages"], shared["staleness"]) == (2, 1, 0)
    assert all(each["groups"] == 1 for each in others)
    assert 1.2 < shared["speedup"] <= 2.0, "weights are read for half a batch too"
    assert shared["weight_bytes"] == in_order["weight_bytes"]
    assert shared["bytes_per_step"] == 4 * 4 * 8 * 8, "one half of a prediction, in float32"


def test_seconds_of_half_a_batch_are_half_unless_given(tmp_path: Path) -> None:
    others = [*(f"{name}_blocks.{i}" for name in ("down", "up") for i in range(3)), "mid_block", "conv_out"]
    block_ms = dict.fromkeys(["conv_in", *others], 1.0)
    options = ["--latency-us", "0", "--bandwidth-gbs", "1e9", "--steps", "30"]
    for part_ms, half in ((None, 0.5), (dict.fromkeys(block_ms, 0.8), 0.8)):
        times = {"block_ms": block_ms, "driver_ms": 0.0}
        (tmp_path / "times.json").write_text(
            json.dumps(times if part_ms is None else times | {"part_block_ms": part_ms})
        )
        found = planned(tmp_path, *DEMO, "--times", str(tmp_path / "times.json"), *options)
        in_order, shared, *_ = found["candidates"]
        assert shared["total_s"] == pytest.approx(half * in_order["total_s"], rel=0.02)
        assert ("half of it for half a batch" in found["times"]) == (part_ms is None)


def test_memory_limit_is_kept_by_another_cut_if_need_be(
    three_devices: dict[str, Any], tmp_path: Path
) -> None:
    free = named(three_devices)
    limit = 0.53 * free[1, 1, 1]["weight_bytes"][0]
    assert max(free[2, 1, 1]["weight_bytes"]) > limit
    found = planned(tmp_path, *DEMO, "--max-memory", f"{limit / 1e9}")
    assert max(chosen(found)["weight_bytes"]) <= limit
    assert chosen(found)["num_stages"] == 2


def test_machine_is_the_one_described(three_devices: dict[str, Any], tmp_path: Path) -> None:
    """Half the speed on the second device is a third more time; links of 5 ms come on top."""
    options = ["--speeds", "1,0.5", "--latency-us", "5000", "--bandwidth-gbs", "0.1", "--steps", "30"]
    found = planned(tmp_path, *DEMO, *options)
    assert found["device_speeds"] == [1.0, 0.5]
    assert (found["latency_s"], found["bandwidth_bytes_per_s"]) == (5e-3, 1e8)
    whole = named(three_devices)[1, 1, 1]["total_s"]
    assert named(found)[1, 1, 1]["total_s"] == whole
    assert named(found)[2, 1, 1]["total_s"] > 2 / 3 * whole + 30 * 5e-3


def test_chosen_plan_is_one_that_parallelize_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    assert run(build_app(), ["plan", "--model", str(DEMO_MODEL), "--devices", "2", "-o", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "->" in printed
    assert "estimated" in printed
    pipe = load_demo_pipeline()
    made = asyncdiff.Plan.load(file)
    assert made.num_workers == 2
    with asyncdiff.parallelize(pipe, plan=made, runtime="local") as handle:
        pipe("a red circle", num_inference_steps=4)
        assert handle.plan == made


def test_measured_times_are_written_and_taken_again(tmp_path: Path) -> None:
    """A profile of one machine plans on another, and gives the same predictions."""
    (tmp_path / "again").mkdir()
    measured = planned(tmp_path, *DEMO, "--profile", "--machine", "nvlink", "--steps", "20")
    assert measured["driver_ms"] > 0
    assert measured["block_ms"].keys() == measured["part_block_ms"].keys()
    again = planned(
        tmp_path / "again", *DEMO, "--times", str(tmp_path / "predicted.json"), "--machine", "nvlink",
        "--steps", "20",
    )  # fmt: skip
    for before, after in zip(measured["candidates"], again["candidates"], strict=True):
        assert after.pop("total_s") == pytest.approx(before.pop("total_s"))
        assert after.pop("speedup") == pytest.approx(before.pop("speedup"))
        assert after == before


def test_given_times_decide_the_cut(tmp_path: Path) -> None:
    """More than half of the time in the first convolution: it is a stage of its own."""
    others = [*(f"{name}_blocks.{i}" for name in ("down", "up") for i in range(3)), "mid_block", "conv_out"]
    times = tmp_path / "times.json"
    times.write_text(json.dumps({"conv_in": 10.0, **dict.fromkeys(others, 1.0)}))
    found = named(planned(tmp_path, *DEMO, "--times", str(times), "--machine", "nvlink", "--steps", "30"))
    first, second = found[2, 1, 1]["weight_bytes"]
    assert first < 0.05 * second
    assert found[2, 1, 1]["total_s"] == pytest.approx(0.018 + 29 * 0.010, rel=0.05)


def test_measured_link_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slowest of them."""
    links = (
        LinkSpeed(("cpu", "cpu"), "gloo", ((1000, 1e-3), (4_001_000, 5e-3))),
        LinkSpeed(("cpu", "cpu"), "gloo", ((1000, 2e-3), (4_001_000, 4e-3))),
    )
    monkeypatch.setattr("asyncdiff.bench.link.measure_links", lambda names: links)
    found = planned(tmp_path, *DEMO, "--measure")
    assert (found["latency_s"], found["bandwidth_bytes_per_s"]) == (2e-3, pytest.approx(1e9))


BAD: list[tuple[list[str], str]] = [
    (["--arch", "sd21", "--model", "a/b"], "leave one of them out"),
    (["--arch", "sd99", "--devices", "cpu,cpu"], "sd99"),
    (["--model", "./nowhere"], "no such folder"),
    (["--size", "250"], "--size 250"),
    (["--steps", "0"], "--steps 0"),
    (["--dtype", "int8"], "bfloat16"),
    (["--devices", "gpu,gpu"], "'gpu' is no device"),
    (["--devices", "0"], "--devices 0"),
    (["--speeds", "1,fast"], "--speeds 1,fast"),
    (["--speeds", "1,0"], "above 0"),
    (["--speeds", "1,nan"], "above 0"),
    (["--devices", "cpu,cpu", "--speeds", "1"], "2 devices need 2 speeds"),
    (["--devices", "3", "--speeds", "1,1"], "3 devices need 3 speeds"),
    (["--machine", "abacus"], "nvlink"),
    (["--latency-us", "-1"], "--latency-us -1"),
    (["--bandwidth-gbs", "0"], "--bandwidth-gbs 0"),
    (["--measure", "--machine", "nvlink"], "leave --machine"),
    (["--measure", "--latency-us", "3"], "leave --machine"),
    (["--profile", "--times", "times.json"], "leave one of them out"),
    (["--times", "missing.json"], "--times missing.json"),
    (["--times", "list.json"], "block names and milliseconds"),
    (["--times", "words.json"], "block names and milliseconds"),
    (["--times", "parts.json"], "part_block_ms must be"),
    (["--times", "unknown.json", "--arch", "demo", "--devices", "cpu,cpu"], "Perhaps conv_in"),
    (["--warmup-steps", "0"], "--warmup-steps 0"),
    (["--warmup-steps", "1,,3"], "--warmup-steps 1,,3"),
    (["--forecast", "cubic"], "linear"),
    (["--max-staleness", "-1"], "--max-staleness -1"),
    (["--max-memory", "0"], "--max-memory 0"),
    (["--max-memory", "1e-6", "--arch", "demo", "--devices", "cpu,cpu"], "the least memory is"),
    (["-o", "plan.txt"], ".json"),
    (["-o", "missing/plan.json"], "does not exist"),
    (["--json", "plan.csv"], ".json"),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "times.json").write_text('{"conv_in": 1.0}')
    (tmp_path / "unknown.json").write_text('{"conv_inn": 1.0}')
    (tmp_path / "list.json").write_text("[1.0]")
    (tmp_path / "words.json").write_text('{"conv_in": "1 ms"}')
    (tmp_path / "parts.json").write_text(
        '{"block_ms": {"conv_in": 1.0}, "part_block_ms": {"conv_in": "1 ms"}}'
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ASYNCDIFF_DEBUG", raising=False)
    return tmp_path


@pytest.mark.parametrize(("options", "expected"), BAD, ids=lambda value: str(value)[-60:])
def test_bad_usage_is_one_line_and_code_2(
    options: list[str], expected: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(folder.rglob("*"))
    assert run(build_app(), ["plan", *options]) == 2
    captured = capsys.readouterr()
    error = captured.err.splitlines()[-1]
    assert captured.out == ""
    assert error.startswith("Error: ")
    assert [line for line in captured.err.splitlines() if "..." not in line] == [error]
    assert expected in error
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(("options", "code"), [(["--help"], 0), (["--speeds", "1,0"], 2)])
def test_no_torch_before_there_is_something_to_do(options: list[str], code: int) -> None:
    script = (
        "import sys\nfrom asyncdiff.cli import main\n"
        f"try: main(['plan', *{options!r}])\n"
        f"except SystemExit as end: assert end.code == {code}, end.code\n"
        "assert not {'torch', 'diffusers', 'numpy'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_ways_with_a_device_for_the_controlnet_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--arch", "controlnet-demo", "--dtype", "float32", "--devices", "cpu,cpu", "--steps", "10"]
    found = planned(tmp_path, *options, "--latency-us", "0", "--bandwidth-gbs", "1e9")
    assert "ControlNet" in capsys.readouterr().out
    whole = [
        each for each in found["candidates"] if each["num_stages"] * each["groups"] * each["stride"] == 1
    ]
    one = {each["controlnet"]: each for each in whole}
    assert one["overlap"]["devices"] == one["ahead"]["devices"] == ["cpu"]
    step_s, controlnet_s = one["serial"]["total_s"] / 10, found["controlnet_ms"] / 1e3
    assert 0 < controlnet_s < step_s
    assert one["ahead"]["total_s"] <= one["overlap"]["total_s"] < one["serial"]["total_s"]
    denoiser_s = step_s - controlnet_s
    assert denoiser_s < one["overlap"]["total_s"] / 10 < step_s
    in_order_s = 2 * one["overlap"]["total_s"] / 10  # of warm-up, and the step in which it gets ahead
    assert one["ahead"]["total_s"] == pytest.approx(in_order_s + 8 * max(denoiser_s, controlnet_s), rel=1e-6)
    without = planned(tmp_path, "--arch", "demo", *options[2:], "--latency-us", "0", "--bandwidth-gbs", "1e9")
    assert one["serial"]["total_s"] == pytest.approx(without["candidates"][0]["total_s"] + 10 * controlnet_s)
    assert {each["controlnet"] for each in without["candidates"]} == {"serial"}
