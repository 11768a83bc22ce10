"""Cut points against all cut points there are."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
from graphs import make_graph
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncdiff.errors import ConfigurationError
from asyncdiff.graph import BlockGraph, BlockKey, Partition, crossing_atoms
from asyncdiff.planner import estimate_seconds, partition_chain, partition_nested, predict, stage_speeds


@st.composite
def graphs(draw: st.DrawFn, least: int) -> BlockGraph:
    n = draw(st.integers(least, 9))
    seconds = [float(draw(st.integers(0, 6))) for _ in range(n)]
    reads = [draw(st.lists(st.integers(0, i - 1), max_size=3)) if i else [] for i in range(n)]
    output_reads = draw(st.lists(st.integers(0, n - 1), max_size=2))
    sizes = [draw(st.integers(1, 5)) for _ in range(n)]
    weights = [draw(st.integers(0, 4)) for _ in range(n)]
    # With work in the blocks at all, glue costs its FLOPs in seconds here: a block's FLOPs are its seconds.
    return make_graph(seconds, reads, output_reads, sizes, float(draw(st.integers(0, 2))), weights)


def all_chains(graph: BlockGraph, num_stages: int) -> Iterator[Partition]:
    keys = [block.key for block in graph.blocks]
    for cuts in itertools.combinations(range(1, len(keys)), num_stages - 1):
        bounds = [0, *cuts, len(keys)]
        yield Partition("chain", tuple(tuple(keys[a:b]) for a, b in itertools.pairwise(bounds)))


def all_nested(graph: BlockGraph, num_stages: int) -> Iterator[Partition]:
    keys = [block.key for block in graph.blocks]
    for cuts in itertools.combinations(range(1, len(keys)), num_stages):
        inner = [tuple(keys[a:b]) for a, b in itertools.pairwise(cuts)]
        yield Partition("nested", (tuple(keys[: cuts[0]] + keys[cuts[-1] :]), *inner))


def largest_stage(
    graph: BlockGraph, partition: Partition, speeds: tuple[float, ...], driver_seconds: float = 0.0
) -> float:
    """Straight from the definition, rank by rank: blocks and glue of its stage over its speed, and on rank 0
    what the driver does for every step of a round."""
    seconds = {block.key: block.flops for block in graph.blocks}
    glue = graph.glue_flops if sum(seconds.values()) else 0.0
    costs = [sum(seconds[key] for key in keys) + glue for keys in partition.stages]
    stride = len(speeds) - partition.num_stages + 1
    ranks = [*range(partition.num_stages), *[partition.replicated_stage] * (stride - 1)]
    busy = [costs[stage] / speed for stage, speed in zip(ranks, speeds, strict=True)]
    busy[0] += stride * driver_seconds
    return max(busy)


def largest_share(graph: BlockGraph, partition: Partition) -> float:
    held = {block.key: block.parameter_bytes for block in graph.blocks}
    return max(sum(held[key] for key in keys) for keys in partition.stages) / max(sum(held.values()), 1)


def crossing_bytes_of(graph: BlockGraph, partition: Partition, stride: int) -> int:
    """One message of each leaf to each device of each stage that reads it."""
    segments = partition.segments(graph)
    return sum(
        graph.spec(atom).num_bytes * (stride if segments[reader].stage == partition.replicated_stage else 1)
        for (_, reader), atoms in crossing_atoms(graph, segments).items()
        for atom in atoms
    )


@pytest.mark.parametrize("kind", ["chain", "nested"])
@given(data=st.data())
@settings(max_examples=150)
def test_partition_is_the_best_there_is(kind: str, data: st.DataObject) -> None:
    """Of those that fit the devices the least largest stage, and within the tolerance the fewest bytes."""
    num_stages, stride = data.draw(st.integers(2 if kind == "nested" else 1, 4)), data.draw(st.integers(1, 3))
    graph = data.draw(graphs(least=num_stages + 1))
    speeds = tuple(data.draw(st.sampled_from([0.5, 1.0, 3.0])) for _ in range(num_stages + stride - 1))
    imbalance = data.draw(st.sampled_from([0.0, 0.005, 0.3]))
    cut, every = (partition_nested, all_nested) if kind == "nested" else (partition_chain, all_chains)
    share = data.draw(st.sampled_from([None, 0.4, 0.6]))
    possible = [
        each
        for each in every(graph, num_stages)
        if share is None or largest_share(graph, each) <= share + 1e-12
    ]
    driver = data.draw(st.sampled_from([0.0, 0.5, 4.0]))
    options = {"speeds": speeds, "stride": stride, "imbalance": imbalance, "max_weight_share": share}
    options["driver_seconds"] = driver
    if not possible:
        with pytest.raises(ConfigurationError, match="within the given share"):
            cut(graph, num_stages, **options)
        return
    best = min(largest_stage(graph, each, speeds, driver) for each in possible)
    allowed = [
        each
        for each in possible
        if largest_stage(graph, each, speeds, driver) <= best * (1 + imbalance) * (1 + 1e-12)
    ]
    found = cut(graph, num_stages, **options)
    assert found in possible
    found.validate(graph)
    assert largest_stage(graph, found, speeds, driver) <= best * (1 + imbalance) * (1 + 1e-6)
    if sum(block.flops for block in graph.blocks):
        predicted = predict(
            graph, found, estimate_seconds(graph), stride=stride, speeds=speeds, driver_seconds=driver
        )
        assert max(predicted.stage_seconds) == pytest.approx(largest_stage(graph, found, speeds, driver))
    fewest = min(crossing_bytes_of(graph, each, stride) for each in allowed)
    assert crossing_bytes_of(graph, found, stride) == fewest


def test_equal_blocks_are_divided_evenly() -> None:
    """Among partitions of equal bytes, the most even one: 10 equal blocks on 4 stages give no 3, 3, 3, 1."""
    graph = make_graph([1.0] * 10, [[], *([i] for i in range(9))], [9], [4] * 10)
    assert sorted(map(len, partition_chain(graph, 4).stages)) == [2, 2, 3, 3]


def test_imbalance_buys_fewer_bytes() -> None:
    """A cut after b1 is even, but crosses 100 elements where one block further 1 crosses."""
    graph = make_graph([10.0, 10.0, 0.2, 10.0, 9.8], [[], [0], [1], [2], [3]], [4], [1, 100, 1, 1, 1])
    strict = partition_chain(graph, 2, imbalance=0.0)
    loose = partition_chain(graph, 2, imbalance=0.02)
    assert [len(keys) for keys in strict.stages] == [2, 3]
    assert [len(keys) for keys in loose.stages] == [3, 2]


def test_a_slow_device_gets_less() -> None:
    graph = make_graph([1.0] * 9, [[], *([i] for i in range(8))], [8], [1] * 9)
    assert [len(keys) for keys in partition_chain(graph, 2, speeds=(2.0, 1.0)).stages] == [6, 3]
    assert [len(keys) for keys in partition_nested(graph, 2, speeds=(1.0, 2.0)).stages] == [3, 6]


def test_the_driver_s_own_work_counts_as_the_first_stage_s() -> None:
    """Nine blocks of 1 s, 3 s of driver work: 3 and 6 blocks make 6 s each."""
    graph = make_graph([1.0] * 9, [[], *([i] for i in range(8))], [8], [1] * 9)
    for cut in (partition_chain, partition_nested):
        assert [len(keys) for keys in cut(graph, 2, driver_seconds=3.0).stages] == [3, 6]
        # The driver is as slow as it was measured to be, whatever its device is called.
        assert [len(k) for k in cut(graph, 2, speeds=(2.0, 2.0), driver_seconds=2.5).stages] == [2, 7]


def test_each_step_of_a_round_is_the_driver_s_work() -> None:
    """Stride 2, the first stage replicated (nested): only rank 0 has the work, twice a round."""
    graph = make_graph([1.0] * 9, [[], *([i] for i in range(8))], [8], [1] * 9)
    found = partition_nested(graph, 2, stride=2, driver_seconds=1.5)
    assert [len(keys) for keys in found.stages] == [3, 6]
    found = partition_nested(graph, 2, stride=2, speeds=(1.0, 1.0, 0.5), driver_seconds=1.5)
    assert [len(keys) for keys in found.stages] == [3, 6]  # 3 / 0.5 = 3 + 2 * 1.5
    assert predict(
        graph, found, [1.0] * 9, stride=2, speeds=(1.0, 1.0, 0.5), driver_seconds=1.5
    ).stage_seconds == (6.0, 6.0)


def test_replicated_stage_is_as_fast_as_its_slowest_copy() -> None:
    assert stage_speeds("chain", 2, 3, (1.0, 4.0, 2.0, 3.0)) == (1.0, 2.0)
    assert stage_speeds("nested", 2, 3, (4.0, 1.0, 2.0, 3.0)) == (2.0, 1.0)
    assert stage_speeds("chain", 1, 2, (4.0, 1.0)) == (1.0,)
    assert stage_speeds("chain", 3, 2) == (1.0, 1.0, 1.0)


def test_one_stage_holds_everything() -> None:
    graph = make_graph([1.0, 2.0], [[], [0]], [1], [1, 1])
    for cut in (partition_chain, partition_nested):
        assert cut(graph, 1).stages == ((BlockKey("b0"), BlockKey("b1")),)


def test_too_many_stages_are_refused() -> None:
    graph = make_graph([1.0, 2.0], [[], [0]], [1], [1, 1])
    with pytest.raises(
        ConfigurationError, match="num_stages=3 needs at least 3 blocks, but this denoiser has 2"
    ):
        partition_chain(graph, 3)
    with pytest.raises(ConfigurationError, match="num_stages=2 needs at least 3 blocks"):
        partition_nested(graph, 2)
    with pytest.raises(ConfigurationError, match="needs 2 positive device speeds"):
        partition_chain(graph, 2, speeds=(1.0,))
    with pytest.raises(ConfigurationError, match="num_stages must be an integer"):
        partition_chain(graph, True)


@pytest.mark.timeout(60)
def test_three_hundred_blocks_with_skips_are_planned_at_once() -> None:
    """The size of an SDXL U-Net; also with one block that leaves every other cut free."""
    n = 300
    for costs in ([1.0 + i % 7 for i in range(n)], [400.0 if i == 150 else 1.0 for i in range(n)]):
        reads = [[j for j in {i - 1, n - i} if 0 <= j < i] for i in range(n)]
        graph = make_graph(costs, reads, [n - 1], [8] * n)
        assert partition_chain(graph, 4).num_stages == 4
        assert partition_nested(graph, 3).num_stages == 3


def test_predictions_follow_from_their_definitions() -> None:
    """Blocks of 3, 1, 2, 2 s and 1 s of glue on two stages, the second on three devices (stride 3)."""
    graph = make_graph([3.0, 1.0, 2.0, 2.0], [[], [0], [0, 1], [2]], [0, 3], [1, 2, 3, 4], glue=1.0)
    keys = [block.key for block in graph.blocks]
    partition = Partition("chain", (tuple(keys[:2]), tuple(keys[2:])))
    found = predict(graph, partition, estimate_seconds(graph), stride=3, speeds=(1.0, 1.0, 0.5, 1.0))
    assert found.segment_seconds == (5.0, 5.0)
    assert found.stage_seconds == (5.0, 10.0)
    assert found.balance == pytest.approx(10.0 * 2 / 15.0)
    assert found.ideal_speedup == pytest.approx(9.0 / (10.0 / 3))
    assert found.step_in_order_seconds(3) == pytest.approx(9.0)
    # b0 (4 bytes, also read by the output) and b1 (8 bytes), once a round of three steps to three copies.
    assert found.crossing_bytes_per_step == 12.0
    assert found.parameter_bytes == (20, 20)
    assert (found.driver_seconds, found.speeds) == (0.0, (1.0, 1.0, 0.5, 1.0))
    driven = predict(graph, partition, estimate_seconds(graph), stride=3, driver_seconds=2.0)
    assert driven.stage_seconds == (11.0, 5.0)
    assert driven.ideal_speedup == pytest.approx((9.0 + 2.0) / (11.0 / 3))
    assert driven.step_in_order_seconds(3) == pytest.approx(9.0 + 2.0)


def test_stages_that_read_the_latents_are_known() -> None:
    """Through a block, or for the output; unknown where the graph does not say what the latents are."""
    graph = make_graph([1.0] * 4, [[], [0], [1], [2]], [3], [1] * 4)
    blocks = (replace(graph.blocks[0], inputs=("sample", "timestep")), *graph.blocks[1:])
    keys = [block.key for block in graph.blocks]
    chain = Partition("chain", (tuple(keys[:2]), tuple(keys[2:])))
    nested = Partition("nested", ((keys[0], keys[3]), (keys[1], keys[2])))

    def stages(partition: Partition, **changes: object) -> tuple[int, ...] | None:
        changed = replace(graph, blocks=blocks, **changes)
        return predict(changed, partition, [1.0] * 4).latents_stages

    assert stages(chain) is None
    assert stages(chain, latents=("sample",)) == (0,)
    assert stages(chain, latents=("sample",), output_inputs=("sample",)) == (0, 1)
    assert stages(nested, latents=("sample",), output_inputs=("sample",)) == (0,)
    assert stages(chain, latents=("another",)) == ()


def test_measured_glue_counts_as_measured() -> None:
    graph = replace(make_graph([3.0, 1.0], [[], [0]], [1], [1, 1], glue=1.0), glue_seconds=0.25)
    found = predict(graph, partition_chain(graph, 2), estimate_seconds(graph))
    assert found.stage_seconds == (3.25, 1.25)


def test_nested_predictions_count_glue_once_per_stage() -> None:
    graph = make_graph([3.0, 1.0, 2.0, 2.0], [[], [0], [1], [0, 2]], [3], [1, 2, 3, 4], glue=1.0)
    keys = [block.key for block in graph.blocks]
    partition = Partition("nested", ((keys[0], keys[3]), (keys[1], keys[2])))
    found = predict(graph, partition, estimate_seconds(graph))
    assert found.segment_seconds == (4.0, 4.0, 2.0)
    assert found.stage_seconds == (6.0, 4.0)
    assert (
        found.crossing_bytes_per_step == 4.0 + 12.0
    )  # b0 to the inner stage, b2 back; the skip stays at home
