"""Plans: made, saved, edited, passed back; and what a run reports."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from random_pipelines import generate, prompt, sd, sd3

import asyncdiff
from asyncdiff.errors import ConfigurationError

pytestmark = pytest.mark.filterwarnings("ignore::asyncdiff.pipeline.user_warning.AsyncDiffWarning")


def example(pipe: Any) -> dict[str, Any]:
    return {"num_inference_steps": 8, "height": 8, "width": 8, "guidance_scale": 4.0, **prompt(pipe)}


@pytest.mark.parametrize("build", [sd, sd3])
def test_plan_is_the_one_that_parallelize_makes(build: Any) -> None:
    pipe = build()
    picture = generate(pipe)
    made = asyncdiff.plan(pipe, num_stages=2, stride=2, example=example(pipe))
    assert torch.equal(generate(pipe), picture)
    with asyncdiff.parallelize(pipe, num_stages=2, stride=2) as handle:
        assert handle.plan is None
        generate(pipe)
        assert handle.plan == made


def test_plan_survives_its_file(tmp_path: Path) -> None:
    pipe = sd()
    plan = asyncdiff.plan(pipe, num_stages=3, warmup_steps=2, forecast="none", example=example(pipe))
    plan.save(tmp_path / "plan.json")
    loaded = asyncdiff.Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    with asyncdiff.parallelize(pipe, num_stages=3, warmup_steps=2, forecast="none"):
        expected = generate(pipe, steps=8)
    with asyncdiff.parallelize(pipe, plan=loaded) as handle:
        assert handle.plan == plan
        assert torch.equal(generate(pipe, steps=8), expected)


def test_edited_plan_is_followed(tmp_path: Path) -> None:
    pipe = sd()
    plan = asyncdiff.plan(pipe, num_stages=2, example=example(pipe))
    fields = json.loads(plan.to_json())
    fields["kind"] = "chain"
    fields["stages"] = [["conv_in", "down_blocks"], ["mid_block", "up_blocks", "conv_norm_out", "conv_out"]]
    fields["warmup_steps"] = 3
    edited = asyncdiff.Plan.from_json(json.dumps(fields))
    with asyncdiff.parallelize(pipe, plan=edited) as handle:
        by_plan = generate(pipe, steps=8)
        owners = handle._division.installations[0].structures.owners
    assert {key.path.split(".")[0] for key in owners.stages[0]} <= {"conv_in", "down_blocks"}
    with asyncdiff.parallelize(pipe, num_stages=2, warmup_steps=3, partition=fields["stages"]):
        assert torch.equal(generate(pipe, steps=8), by_plan)


def test_plan_for_devices_also_runs_here() -> None:
    pipe = sd()
    plan = asyncdiff.plan(pipe, ["cpu", "cpu"], example=example(pipe))
    assert plan.devices == ("cpu", "cpu")
    assert plan.threads_per_device is not None
    with asyncdiff.parallelize(pipe, plan=plan, runtime="local") as handle:
        assert handle.workers == ()
        generate(pipe, steps=8)
        assert len(handle.last_run.devices) == 1


def test_plan_that_says_another_number_is_refused() -> None:
    pipe = sd()
    plan = asyncdiff.plan(pipe, num_stages=2, example=example(pipe))
    with pytest.raises(ConfigurationError, match="num_stages=3 was given with a plan of 2 stages"):
        asyncdiff.parallelize(pipe, num_stages=3, plan=plan)
    with pytest.raises(ConfigurationError, match="needs 2 devices"):
        asyncdiff.parallelize(pipe, ["cpu"] * 3, plan=plan)


def test_plan_of_another_denoiser_is_refused() -> None:
    pipe = sd()
    plan = asyncdiff.plan(sd3(), num_stages=2, example=example(sd3()))
    with pytest.raises(ConfigurationError, match="no module of the denoiser"):
        asyncdiff.parallelize(pipe, plan=plan)


def test_profiled_plan_measures_every_block() -> None:
    pipe = sd()
    threads = torch.get_num_threads()
    plan = asyncdiff.plan(pipe, num_stages=2, profile=True, example=example(pipe))
    assert torch.get_num_threads() == threads
    assert plan.predictions is not None
    assert all(seconds > 0 for seconds in plan.predictions.stage_seconds)
    with asyncdiff.parallelize(pipe, plan=replace(plan, warmup_steps=99)):
        parallel = generate(pipe)
    assert torch.equal(parallel, generate(pipe))


class Dawdler(DDIMScheduler):
    """A noise scheduler that takes 20 ms a step."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        time.sleep(0.02)
        return super().step(*args, **kwargs)


@pytest.mark.parametrize("steps", [8, 3, 2])
def test_profile_counts_the_driver_s_own_work(steps: int) -> None:
    """As the first stage's; also where a run has only one interval between two denoiser calls."""
    pipe = sd(scheduler=Dawdler())
    call = example(pipe) | {"num_inference_steps": steps}
    plan = asyncdiff.plan(pipe, num_stages=2, profile=True, example=call)
    assert plan.predictions is not None
    assert 0.02 <= plan.predictions.driver_seconds < 0.2
    assert plan.predictions.stage_seconds[0] > 0.02
    assert generate(pipe) is not None


def test_profile_of_a_run_of_one_step_has_no_driver_s_work() -> None:
    pipe = sd(scheduler=Dawdler())
    plan = asyncdiff.plan(
        pipe, num_stages=2, profile=True, example=example(pipe) | {"num_inference_steps": 1}
    )
    assert plan.predictions is not None
    assert plan.predictions.driver_seconds == 0.0


def test_profile_leaves_nothing_behind() -> None:
    pipe = sd()
    picture, forward = generate(pipe), vars(pipe.unet).get("forward")
    asyncdiff.plan(pipe, num_stages=2, profile=True, example=example(pipe))
    assert vars(pipe.unet).get("forward") is forward
    assert torch.equal(generate(pipe), picture)


@pytest.mark.parametrize("partition", [None, "chain", "nested"])
def test_stated_speeds_move_the_cut(partition: str | None) -> None:
    """A second device of a third of the speed gets less than the first; the plan says what it assumed."""
    pipe = sd()
    how = {"example": example(pipe), "partition": partition, "guidance": "together"}
    even, uneven = (asyncdiff.plan(pipe, ["cpu", "cpu"], speeds=s, **how) for s in (None, (1.0, 1 / 3)))
    assert even.predictions is not None
    assert uneven.predictions is not None
    assert uneven.predictions.speeds == (1.0, 1 / 3)
    assert uneven.predictions.segment_seconds[-1] != even.predictions.segment_seconds[-1]
    slow_share = uneven.predictions.stage_seconds[1] / 3 / sum(even.predictions.stage_seconds)
    assert 0.1 < slow_share < 0.4  # a quarter, as near as blocks allow
    with asyncdiff.parallelize(pipe, plan=uneven, runtime="local"):
        assert generate(pipe, steps=6).isfinite().all()


@pytest.mark.parametrize("speeds", [(1.0,), (1.0, 0.0), (1.0, -1.0), (1.0, float("nan")), ("fast", "slow")])
def test_speeds_that_are_none_are_refused(speeds: Any) -> None:
    pipe = sd()
    with pytest.raises(ConfigurationError, match="needs 2 positive device speeds"):
        asyncdiff.plan(pipe, ["cpu", "cpu"], speeds=speeds, example=example(pipe))


@pytest.mark.parametrize(("speeds", "groups"), [(None, 2), ((1.0, 0.9), 2), ((0.5, 1.0), 1)])
def test_guidance_is_not_split_between_unequal_devices(speeds: tuple[float, ...] | None, groups: int) -> None:
    """Half the work on a device of half the speed would take as long as all of it on the fast one."""
    pipe = sd()
    assert asyncdiff.plan(pipe, ["cpu", "cpu"], speeds=speeds, example=example(pipe)).groups == groups


def test_plan_is_that_of_the_groups_that_the_first_call_chooses() -> None:
    """Made from one part of the example call's batch; saved, loaded and used like any other."""
    pipe = sd()
    made = asyncdiff.plan(pipe, ["cpu", "cpu"], example=example(pipe))
    assert (made.groups, made.num_stages, made.num_workers) == (2, 1, 2)
    unguided = example(pipe) | {"guidance_scale": 1.0}
    assert asyncdiff.plan(pipe, ["cpu", "cpu"], example=unguided).groups == 1
    together = asyncdiff.plan(pipe, ["cpu", "cpu"], example=example(pipe), guidance="together")
    assert made.predictions is not None
    assert together.predictions is not None
    whole_s = sum(together.predictions.segment_seconds)
    assert 0.45 * whole_s < sum(made.predictions.segment_seconds) < 0.95 * whole_s
    loaded = asyncdiff.Plan.from_json(made.to_json())
    assert loaded == made
    with asyncdiff.parallelize(pipe, 2, runtime="local") as handle:
        expected = generate(pipe)
        assert handle.plan is not None
        assert (handle.plan.groups, handle.plan.stages) == (made.groups, made.stages)
    with asyncdiff.parallelize(pipe, plan=loaded, runtime="local"):
        assert torch.equal(generate(pipe), expected)
    with pytest.raises(ConfigurationError, match='guidance="together" was given with a plan of 2 groups'):
        asyncdiff.parallelize(pipe, plan=loaded, guidance="together")
    with pytest.raises(ConfigurationError, match=r"needs 2 devices \(2 groups\)"):
        asyncdiff.parallelize(pipe, ["cpu"] * 3, plan=loaded)
    with pytest.raises(ConfigurationError, match="cannot be shared between 2 groups"):
        asyncdiff.plan(pipe, 2, guidance="split", example=unguided)


def test_profile_of_one_part_runs_the_pipeline_with_the_whole() -> None:
    pipe = sd()
    plan = asyncdiff.plan(pipe, ["cpu", "cpu"], profile=True, guidance="split", example=example(pipe))
    assert plan.predictions is not None
    assert plan.groups == 2
    assert all(seconds > 0 for seconds in plan.predictions.stage_seconds)


def test_example_that_never_calls_the_denoiser_is_refused() -> None:
    pipe = sd()
    pipe.__class__ = type("Idle", (type(pipe),), {"__call__": lambda self, **_: None})
    with pytest.raises(ConfigurationError, match="without calling the denoiser"):
        asyncdiff.plan(pipe, num_stages=2, example={})


def test_last_run_says_what_happened(tmp_path: Path) -> None:
    pipe = sd()
    with asyncdiff.parallelize(pipe, num_stages=2, stride=2, warmup_steps=2, partition="chain") as handle:
        generate(pipe, steps=8, seed=1)
        generate(pipe, steps=7)
        report = handle.last_run
        ((analysis,),) = handle._division.installations[0].structures.analyses.values()
        wiring = analysis.wiring
    assert [step.step for step in report.steps] == list(range(7))
    hidden, prediction = wiring.num_bytes(0, 1), wiring.prediction_bytes
    # In order (0, 1): hidden states to both copies of the last stage (the second will read them), and one
    # prediction. Rounds (2, 3), (4, 5): to those that will read them; the last round (6) sends nothing on.
    per_step = [sum(device.bytes_sent for device in step.devices) for step in report.steps]
    assert per_step == [
        2 * hidden + prediction, 2 * hidden + prediction, 2 * hidden + 2 * prediction, 0,
        hidden + 2 * prediction, 0, prediction,
    ]  # fmt: skip
    assert report.bytes_sent == sum(per_step)
    assert all(step.seconds > 0 for step in report.steps)
    assert 0 < report.total_s <= report.denoise_s
    report.write_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {event["pid"] for event in events if event.get("ph") == "X"}
    assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in events if event.get("ph") == "X")


def test_spawned_run_reports_the_same_bytes() -> None:
    pipe = sd()
    reports = []
    for devices in (None, 2):
        with asyncdiff.parallelize(pipe, devices, num_stages=2, warmup_steps=2) as handle:
            generate(pipe, steps=6)
            reports.append(handle.last_run)
    local, spawned = reports
    assert [[d.bytes_sent for d in step.devices] for step in local.steps] == [
        [d.bytes_sent for d in step.devices] for step in spawned.steps
    ]
    assert spawned.devices == ("cpu", "cpu")
    assert all(size > 0 for size in spawned.weight_bytes)
    assert local.weight_bytes == (sum(p.nbytes for p in pipe.unet.parameters()), 0)
    assert spawned.timeline.total_s == pytest.approx(spawned.denoise_s)
