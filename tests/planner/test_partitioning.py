"""Cut points against all cut points there are."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

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


def largest_stage(graph: BlockGraph, partition: Partition, speeds: tuple[float, ...]) -> float:
    """Straight from the definition: blocks and glue of each stage over the speed of its slowest device."""
    seconds = {block.key: block.flops for block in graph.blocks}
    glue = graph.glue_flops if sum(seconds.values()) else 0.0
    devices = [[speed] for speed in speeds[: partition.num_stages]]
    devices[partition.replicated_stage] += speeds[partition.num_stages :]
    costs = [sum(seconds[key] for key in keys) + glue for keys in partition.stages]
    return max(cost / min(own) for cost, own in zip(costs, devices, strict=True))


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
    options = {"speeds": speeds, "stride": stride, "imbalance": imbalance, "max_weight_share": share}
    if not possible:
        with pytest.raises(ConfigurationError, match="within the given share"):
            cut(graph, num_stages, **options)
        return
    best = min(largest_stage(graph, each, speeds) for each in possible)
    allowed = [
        each
        for each in possible
        if largest_stage(graph, each, speeds) <= best * (1 + imbalance) * (1 + 1e-12)
    ]
    found = cut(graph, num_stages, **options)
    assert found in possible
    found.validate(graph)
    assert largest_stage(graph, found, speeds) <= best * (1 + imbalance) * (1 + 1e-6)
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
    # b0 (4 bytes, also read by the output) and b1 (8 bytes), once a round of three steps to three copies.
    assert found.crossing_bytes_per_step == 12.0
    assert found.parameter_bytes == (20, 20)


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
