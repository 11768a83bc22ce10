"""Names, plans and their JSON form."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from asyncdiff.config import Settings
from asyncdiff.errors import ConfigurationError
from asyncdiff.graph import Atom, Block, BlockGraph, BlockKey, Partition, TensorSpec
from asyncdiff.planner import (
    Plan,
    estimate_seconds,
    glue_seconds,
    make_plan,
    partition_by_names,
    simulate,
)
from asyncdiff.planner.costs import estimate_driver_seconds, rates_of
from asyncdiff.simulation import Machine

PATHS = ("conv_in", "down.0.resnets.0", "down.0.attn", "down.1.resnets.0", "mid", "up.0", "up.0", "conv_out")


def block(path: str, call: int, reads: tuple[Atom, ...], **changes: float) -> Block:
    spec = TensorSpec((1, 4), (4, 1), "float16")
    return Block(
        BlockKey(path, call), flops=2e9, memory_bytes=1e7, parameter_bytes=100, outputs=(spec,), reads=reads,
        inputs=(), **changes,
    )  # fmt: skip


@pytest.fixture
def graph() -> BlockGraph:
    """A chain of eight blocks; `up.0` is called twice."""
    blocks: list[Block] = []
    for path in PATHS:
        reads = (Atom(*blocks[-1].key, 0),) if blocks else ()
        blocks.append(block(path, sum(earlier.key.path == path for earlier in blocks), reads))
    return BlockGraph(tuple(blocks), (Atom("conv_out", 0, 0),), (), ())


def test_a_name_covers_everything_below_it(graph: BlockGraph) -> None:
    partition = partition_by_names(graph, [["conv_in", "down"], ["mid", "up", "conv_out"]])
    assert partition.kind == "chain"
    assert [len(keys) for keys in partition.stages] == [4, 4]
    assert (
        partition_by_names(graph, [["conv_in", "down.0"], ["down.1", "mid", "up.0", "conv_out"]]).num_stages
        == 2
    )


def test_a_name_is_no_mere_beginning(graph: BlockGraph) -> None:
    with pytest.raises(ConfigurationError, match=r"names 'dow', which is no block and contains none.*down"):
        partition_by_names(graph, [["conv_in", "dow"], ["mid", "up", "conv_out"]])


def test_nested_follows_from_the_order(graph: BlockGraph) -> None:
    partition = partition_by_names(graph, [["conv_out", "conv_in"], ["down", "mid", "up"]])
    assert partition.kind == "nested"
    assert partition.stages[0] == (BlockKey("conv_in"), BlockKey("conv_out"))


def test_one_call_of_a_block_can_be_named(graph: BlockGraph) -> None:
    for second in ("up.0", "up", "up.0#0"):
        partition = partition_by_names(graph, [["conv_in", "down", "mid", second], ["up.0#1", "conv_out"]])
        assert partition.stage_of[BlockKey("up.0", 0)] == 0
        assert partition.stage_of[BlockKey("up.0", 1)] == 1


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([["conv_in", "down"], ["mid", "up"]], "misses block conv_out"),
        ([["conv_in"], ["conv_out"]], r"misses blocks down.0.resnets.0, .* \.\.\."),
        ([["conv_in", "down"], ["down.1", "mid", "up", "conv_out"]], "repeats block down.1.*0.*stage 1"),
        ([["conv_in", "down", "down"], ["mid", "up", "conv_out"]], "repeats block down.0.resnets.0"),
        ([["conv_in", "mid", "conv_out"], ["down", "up"]], "must visit them in the order"),
        ([["mid", "up", "conv_out"], ["conv_in", "down"]], "must visit them in the order"),
        ([["conv_in", "down", "mid", "up", "conv_out"], []], "Stage 1 of the partition has no block"),
        ([["conv_in", "down", "mid", "up", "conv_out", "up.0#7"]], "names 'up.0#7', which is no block"),
    ],
)  # fmt: skip
def test_wrong_names_are_refused(graph: BlockGraph, stages: list[list[str]], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        partition_by_names(graph, stages)


def test_plan_names_give_its_partition_back(graph: BlockGraph) -> None:
    """Also where a cut runs between the two calls of one block."""
    for kind, num_stages in (
        ("chain", 2),
        ("nested", 2),
        ("chain", 4),
        ("nested", 3),
        ("nested", 1),
        ("chain", 1),
    ):
        devices = ["cpu"] * num_stages
        plan = make_plan(graph, Settings(num_stages), devices, kind=kind)
        partition = plan.partition(graph)
        assert partition.kind == kind
        assert plan == make_plan(graph, Settings(num_stages), devices, partition=partition)
    keys = tuple(each.key for each in graph.blocks)
    split = Partition("chain", (keys[:6], keys[6:]))
    assert make_plan(graph, Settings(2), ["cpu"], partition=split).partition(graph) == split


def test_plan_survives_json_and_file(graph: BlockGraph, tmp_path: Path) -> None:
    settings = Settings(2, stride=2, warmup_steps=3, time_shift=True, forecast="none")
    plan = make_plan(graph, settings, ["cuda:0", "cuda:1", "cuda:2"], kind="nested", threads_per_device=2)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    bare = dataclasses.replace(plan, predictions=None, threads_per_device=None)
    assert Plan.from_json(bare.to_json()) == bare
    assert plan.settings == settings
    assert plan.num_workers == 3


def test_names_are_one_per_line_in_json(graph: BlockGraph) -> None:
    text = make_plan(graph, Settings(2), ["cpu"]).to_json()
    assert '      "conv_in",\n' in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format version 2, but this version of asyncdiff reads 1"),
        ({"format_version": None}, "format version None"),
        ({"warm_up": 3}, r"unknown keys \['warm_up'\]"),
        ({"stages": "conv_in"}, "stages must be a list, not 'conv_in'"),
        ({"stages": [["conv_in"], [1]]}, "an entry of an entry of stages must be of type str, not 1"),
        ({"stages": [["conv_in"], []]}, "Every stage of a plan must name at least one block"),
        ({"stages": []}, "Every stage of a plan must name at least one block"),
        ({"stride": "2"}, "stride must be of type int, not '2'"),
        ({"stride": True}, "stride must be of type int, not True"),
        ({"warmup_steps": 0}, "warmup_steps must be at least 1, but 0 was given"),
        ({"time_shift": 1}, "time_shift must be of type bool, not 1"),
        ({"forecast": "cubic"}, 'forecast must be "none", "linear", "damped" or "latents"'),
        ({"kind": "ring"}, 'kind must be "chain" or "nested"'),
        ({"devices": ["cpu"] * 4}, r"needs 2 devices \(num_stages \+ stride - 1\), or one .* but it lists 4"),
        ({"threads_per_device": 0}, "threads_per_device must be at least 1"),
        ({"predictions": 3}, "predictions must be an object, not 3"),
        ({"predictions": {"balance": 1.0}}, r"predictions lacks the keys \['crossing_bytes'"),
    ],
)
def test_wrong_plans_are_refused(graph: BlockGraph, changes: dict, message: str) -> None:
    data = json.loads(make_plan(graph, Settings(2), ["cpu", "cpu"]).to_json())
    with pytest.raises(ConfigurationError, match=message):
        Plan.from_json(json.dumps({**data, **changes}))


@pytest.mark.parametrize(
    "key", ["kind", "stages", "devices", "stride", "warmup_steps", "time_shift", "forecast"]
)
def test_missing_keys_are_refused(graph: BlockGraph, key: str) -> None:
    data = json.loads(make_plan(graph, Settings(2), ["cpu", "cpu"]).to_json())
    del data[key]
    with pytest.raises(ConfigurationError, match=rf"lacks the keys \['{key}'\]"):
        Plan.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_what_is_no_json_object_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"not valid JSON|must be a JSON object"):
        Plan.from_json(text)


def test_edited_kind_that_contradicts_the_stages_is_refused(graph: BlockGraph) -> None:
    plan = dataclasses.replace(make_plan(graph, Settings(2), ["cpu"]), kind="nested")
    with pytest.raises(ConfigurationError, match="The plan says nested, but its stages are chain"):
        plan.partition(graph)


def test_a_partition_with_another_number_of_stages_is_refused(graph: BlockGraph) -> None:
    with pytest.raises(ConfigurationError, match="num_stages=2, but the partition has 1 stages"):
        make_plan(
            graph, Settings(2), ["cpu"], partition=partition_by_names(graph, [list(dict.fromkeys(PATHS))])
        )
    with pytest.raises(ConfigurationError, match='kind must be "chain" or "nested"'):
        make_plan(graph, Settings(2), ["cpu"], kind="auto")


def test_a_plan_simulates_with_the_driver_s_work_and_says_what_it_assumed(graph: BlockGraph) -> None:
    measured = dataclasses.replace(
        graph, blocks=tuple(dataclasses.replace(each, seconds=1.0) for each in graph.blocks)
    )
    plan = make_plan(measured, Settings(2), ["cpu", "cpu"], speeds=(1.0, 0.5), driver_seconds=0.5)
    assert [len(names) for names in plan.stages] == [5, 3]  # 5.5 s and 6 s
    machine = Machine((1.0, 0.5))
    assert simulate(plan, machine, num_steps=1).total_s == 5.0 + 6.0 + 0.5
    assert simulate(plan, machine, num_steps=1, driver_seconds=0.0).total_s == 11.0
    loaded = Plan.from_json(plan.to_json())
    assert loaded == plan
    assert loaded.predictions is not None
    assert (loaded.predictions.driver_seconds, loaded.predictions.speeds) == (0.5, (1.0, 0.5))


def test_a_file_from_before_the_driver_counted_is_read(graph: BlockGraph) -> None:
    plan = make_plan(graph, Settings(2), ["cpu"], driver_seconds=0.0)
    data = json.loads(plan.to_json())
    del data["predictions"]["driver_seconds"], data["predictions"]["speeds"]
    assert Plan.from_json(json.dumps(data)) == plan


def test_driver_s_work_is_estimated_as_blocks_are(graph: BlockGraph) -> None:
    """From bytes alone; nothing beside blocks that were measured, which are in other units."""
    spec = TensorSpec((1000,), (1,), "float32")
    whole = dataclasses.replace(graph, outputs=(spec,))
    per_byte = 1 / rates_of("cpu", "float32").bytes_per_s
    assert estimate_driver_seconds(whole, "cpu", "float32") == pytest.approx(6 * 4000 * per_byte)
    blocks = tuple(dataclasses.replace(each, seconds=1.0) for each in graph.blocks)
    assert estimate_driver_seconds(dataclasses.replace(whole, blocks=blocks)) == 0.0
    plan = make_plan(whole, Settings(2), ["cpu"], dtype="float32")
    assert plan.predictions is not None
    assert plan.predictions.driver_seconds == estimate_driver_seconds(whole, "cpu", "float32")


def test_description_is_a_table(graph: BlockGraph) -> None:
    plan = make_plan(graph, Settings(2, stride=2), ["cuda:0", "cuda:1", "cuda:2"])
    assert plan.describe() == (
        "chain of 2, stride 2, 1 warm-up step, forecast latents, freshness auto\n"
        "stage  device          blocks  first .. last                cost   weights\n"
        "0      cuda:0          4       conv_in .. down.1.resnets.0  50.0%  57.1%\n"
        "1      cuda:1, cuda:2  4       mid .. conv_out              50.0%  42.9%\n"
        "balance 1.000 (1 is perfect), ideal speed-up 4.00x, crossing 0.00 MB per step\n"
    )
    assert "-" in dataclasses.replace(plan, predictions=None).describe()


def test_a_plan_can_be_simulated(graph: BlockGraph) -> None:
    """Two equal stages of 4 s: in order 8 s, then 4 s a step, and twice that on devices of half the speed."""
    measured = dataclasses.replace(
        graph, blocks=tuple(dataclasses.replace(each, seconds=1.0) for each in graph.blocks)
    )
    plan = make_plan(measured, Settings(2), ["cpu", "cpu"])
    assert simulate(plan, Machine((1.0, 1.0)), num_steps=5).step_seconds == (8.0, 4.0, 4.0, 4.0, 4.0)
    assert simulate(plan, Machine((0.5, 0.5)), num_steps=5).total_s == 48.0
    # 8 bytes cross in order, at 1 byte/s.
    slow = Machine((1.0, 1.0), bandwidth_bytes_per_s=1.0)
    assert simulate(plan, slow, num_steps=1).step_seconds == (16.0,)
    assert simulate(Plan.from_json(plan.to_json()), slow, num_steps=1).total_s == 16.0
    with pytest.raises(ConfigurationError, match="no predictions"):
        simulate(dataclasses.replace(plan, predictions=None), slow, num_steps=1)


def test_measured_seconds_count_where_all_blocks_have_them(graph: BlockGraph) -> None:
    measured = BlockGraph(
        tuple(dataclasses.replace(each, seconds=0.5 + i) for i, each in enumerate(graph.blocks)),
        graph.output_reads, (), (), glue_flops=4e9,
    )  # fmt: skip
    assert estimate_seconds(measured, "cuda", "float16") == tuple(0.5 + i for i in range(8))
    # Glue of two blocks' FLOPs takes twice the average block: 2 * 32 s / 8.
    assert glue_seconds(measured, estimate_seconds(measured)) == pytest.approx(8.0)
    partly = dataclasses.replace(measured, blocks=(*measured.blocks[:-1], graph.blocks[-1]))
    assert estimate_seconds(partly, "cpu", "float32") == estimate_seconds(graph, "cpu", "float32")


def test_estimates_are_a_roofline(graph: BlockGraph) -> None:
    for kind, dtype in (("cpu", "float32"), ("cuda", "float16")):
        rates = rates_of(kind, dtype)
        expected = 2e9 / rates.flops_per_s + 1e7 / rates.bytes_per_s
        assert estimate_seconds(graph, kind, dtype) == pytest.approx((expected,) * 8)
    assert rates_of("xpu", "bfloat16") == rates_of("cuda", "bfloat16")
    assert rates_of("cpu", "float16") == rates_of("cpu", "float32")
