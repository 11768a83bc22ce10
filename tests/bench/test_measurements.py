"""The measurements measure what they say: figures that can be known beforehand come out, the rest is there.

Speed is their output and never asserted here.
"""

import json
import math

import pytest

from asyncdiff.bench.demo import run_demo
from asyncdiff.bench.step import run_step
from asyncdiff.demo import DEMO_CAPTIONS, DEMO_MODELS


@pytest.mark.timeout(300)
def test_step_sends_what_the_graph_says_and_divides_the_weights(monkeypatch):
    # Two spinning threads on a machine that is busy with other tests make a step take seconds.
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    result = run_step(
        arch="demo", size=64, dtype="float32", devices=["cpu", "cpu"], num_stages=2, runs=1, steps=3
    )
    values = json.loads(json.dumps(result.to_json()))
    assert values["bytes_per_step"] == values["expected_bytes_per_step"] > 0
    assert 1 <= sum(values["weight_share"]) < 1.1
    assert all(0 < share < 1 for share in values["weight_share"])
    for name in ("ms_per_step_in_order", "ms_per_step", "ratio", "ceiling"):
        assert values[name] > 0
    assert len(values["resident_bytes"]) == 2


@pytest.mark.wide
@pytest.mark.timeout(300)
def test_step_of_two_groups_sends_one_half_of_a_prediction(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    result = run_step(
        arch="demo", size=64, dtype="float32", devices=["cpu", "cpu"], num_stages=1, guidance="split", runs=1,
        steps=3,
    )  # fmt: skip
    values = json.loads(json.dumps(result.to_json()))
    assert values["groups"] == 2
    assert values["bytes_per_step"] == values["expected_bytes_per_step"] > 0
    assert values["weight_share"] == [1, 1]
    assert values["ceiling"] > 0


@pytest.mark.wide
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("num_stages", "k"), [(1, 2), (2, 4)])
def test_step_with_guidance_refreshed_is_measured_over_whole_periods(monkeypatch, num_stages, k):
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    result = run_step(
        arch="demo", size=64, dtype="float32", devices=["cpu"] * num_stages, num_stages=num_stages,
        guidance_refresh=k, runs=1, steps=k,
    )  # fmt: skip
    values = json.loads(json.dumps(result.to_json()))
    assert values["guidance_refresh"] == k
    assert values["bytes_per_step"] == values["expected_bytes_per_step"]
    assert (values["bytes_per_step"] > 0) == (num_stages > 1)
    assert values["ceiling"] > 0
    assert len(values["compute_ms"]) == num_stages


@pytest.mark.wide
@pytest.mark.timeout(300)
@pytest.mark.parametrize("model", DEMO_MODELS)
def test_demo_in_order_throughout_is_the_same_picture(model):
    result = run_demo(["cpu", "cpu"], model=model, num_stages=2, warmup_steps=4, steps=4, runs=1)
    assert result.psnr_db == math.inf
    assert result.to_json()["model"] == model
    assert result.to_json()["devices"] == ["cpu", "cpu"]


@pytest.mark.timeout(300)
def test_demo_draws_every_caption_and_writes_a_trace(tmp_path):
    result = run_demo(["cpu", "cpu"], num_stages=2, steps=12, runs=1)
    assert 15 < result.psnr_lowest_db <= result.psnr_db < math.inf
    assert result.picture.width > 300
    result.write_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {event["tid"] for event in events if event.get("cat") == "compute"} == {0, 2}
    assert len(DEMO_CAPTIONS) >= 8
