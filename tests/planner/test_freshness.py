"""What is read in time costs no time, and nothing else could be: against a clock for every single block."""

from __future__ import annotations

import math
from collections.abc import Collection
from itertools import pairwise
from typing import NamedTuple

import pytest
from graphs import make_graph
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncdiff.config import Settings
from asyncdiff.errors import ConfigurationError
from asyncdiff.graph import Atom, BlockGraph, BlockKey, Partition, crossing_atoms
from asyncdiff.planner import Plan, freshness, make_plan
from asyncdiff.planner.freshness import fresh_reads, leads

ROUNDS = 40


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """No margin, and links that take no time."""
    monkeypatch.setattr(freshness, "MARGIN", -1e-12)
    monkeypatch.setattr(freshness, "_LINKS", {"cpu": (0.0, math.inf)})


class Case(NamedTuple):
    graph: BlockGraph
    partition: Partition
    driver_s: float

    @property
    def costs(self) -> tuple[float, ...]:
        return tuple(block.flops for block in self.graph.blocks)


@st.composite
def chains(draw: st.DrawFn, most_stages: int) -> Case:
    """A chain of blocks with skips, cut anywhere."""
    count = draw(st.integers(most_stages + 1, 9))
    costs = [float(draw(st.integers(1, 9))) for _ in range(count)]
    reads = [[i - 1, *draw(st.sets(st.integers(0, i - 1), max_size=3))] if i else [] for i in range(count)]
    num_stages = draw(st.integers(2, most_stages))
    cuts = [0, *sorted(draw(st.sets(st.integers(1, count - 1), min_size=num_stages - 1,
                                     max_size=num_stages - 1))), count]  # fmt: skip
    graph = make_graph(costs, reads, [count - 1, draw(st.integers(0, count - 1))], [1] * count)
    stages = tuple(tuple(BlockKey(f"b{i}") for i in range(start, end)) for start, end in pairwise(cuts))
    return Case(graph, Partition("chain", stages), float(draw(st.integers(0, 2))))


def round_seconds(case: Case, fresh: Collection[tuple[Atom, int]]) -> float:
    """The length of a round in the steady state, found by running rounds block by block.

    A worker begins a round as soon as it is done with the last one and has what the others produced in it;
    the driver begins it after its own work on the prediction.
    """
    cost = dict(zip((block.key for block in case.graph.blocks), case.costs, strict=True))
    reads = {block.key: block.reads for block in case.graph.blocks}
    stages = case.partition.stages
    done = [0.0] * len(stages)
    dispatched, history = 0.0, []
    for _ in range(ROUNDS):
        history.append(dispatched)
        ended: dict[BlockKey, float] = {}
        before = list(done)
        for stage, keys in enumerate(stages):
            now = dispatched if stage == 0 else max(before[: stage + 1])
            for key in keys:
                waits = [ended[atom.block] for atom in reads[key] if (atom, stage) in fresh]
                now = ended[key] = max([now, *waits]) + cost[key]
            if stage == len(stages) - 1:
                waits = [ended[atom.block] for atom in case.graph.output_reads if (atom, stage) in fresh]
                now = max([now, *waits])
            done[stage] = now
        dispatched = max(done[0], done[-1]) + case.driver_s
    return (history[-1] - history[ROUNDS // 2]) / (ROUNDS - 1 - ROUNDS // 2)


def chosen(case: Case) -> set[tuple[Atom, int]]:
    found = fresh_reads(case.graph, case.partition, case.costs, driver_seconds=case.driver_s)
    return {(read.atom, read.reader) for read in found}


@pytest.mark.usefixtures("exact")
@settings(max_examples=150, deadline=None)
@given(case=chains(most_stages=4))
def test_reading_in_time_costs_no_time(case: Case) -> None:
    assert round_seconds(case, chosen(case)) == pytest.approx(round_seconds(case, ()))


@pytest.mark.usefixtures("exact")
@settings(max_examples=150, deadline=None)
@given(case=chains(most_stages=2))
def test_anything_else_would_have_to_be_waited_for(case: Case) -> None:
    """With two stages; with more, a leaf of a stage that waits itself may just so be missed."""
    crossing = {
        (atom, reader)
        for (_, reader), atoms in crossing_atoms(case.graph, case.partition.segments(case.graph)).items()
        for atom in atoms
    }
    fresh = chosen(case)
    assert fresh <= crossing
    for other in crossing - fresh:
        assert round_seconds(case, fresh | {other}) > round_seconds(case, ()) + 1e-9, other


def test_a_skip_that_is_made_first_and_used_last_is_read_in_time() -> None:
    """Four blocks of 1 s: b0's output crosses to b1's stage twice, for b2 at its start and for b3 at half."""
    graph = make_graph([1.0] * 4, [[], [0], [1], [2, 0]], [3], [1] * 4)
    stages = ((BlockKey("b0"), BlockKey("b1")), (BlockKey("b2"), BlockKey("b3")))
    plan = make_plan(graph, Settings(2), ["cpu", "cpu"], partition=Partition("chain", stages))
    assert plan.fresh == (), "b0 ends when b3 begins: no margin"
    later = make_graph([0.5, 1.5, 1.0, 1.0], [[], [0], [1], [2, 0]], [3], [1] * 4)
    plan = make_plan(later, Settings(2), ["cpu", "cpu"], partition=Partition("chain", stages))
    assert plan.fresh == (("b0[0]", 1),)
    assert plan.predictions is not None
    assert plan.predictions.fresh_leads == ((0, 1, -0.5),)
    assert Plan.from_json(plan.to_json()) == plan
    paper = make_plan(
        later, Settings(2, freshness="paper"), ["cpu", "cpu"], partition=Partition("chain", stages)
    )
    assert paper.fresh == ()


def test_a_slow_link_comes_too_late() -> None:
    graph = make_graph([0.5, 1.5, 1.0, 1.0], [[], [0], [1], [2, 0]], [3], [int(2e9)] * 4)
    stages = ((BlockKey("b0"), BlockKey("b1")), (BlockKey("b2"), BlockKey("b3")))
    assert fresh_reads(graph, Partition("chain", stages), [0.5, 1.5, 1.0, 1.0]) == ()


def test_a_nested_split_reads_its_first_part_in_time_anyway() -> None:
    graph = make_graph([1.0] * 4, [[], [0], [1], [2, 0]], [3], [1] * 4)
    nested = Partition("nested", ((BlockKey("b0"), BlockKey("b3")), (BlockKey("b1"), BlockKey("b2"))))
    assert fresh_reads(graph, nested, [1.0] * 4) == ()


def test_a_short_stage_waits_at_no_cost() -> None:
    """Stage 1 has 1 s of work in a round of 3 s: it may begin 2 s late, when b0 and even b1 are there."""
    graph = make_graph([1.0, 1.0, 1.0, 1.0], [[], [0], [1], [2, 1, 0]], [3], [1] * 4)
    stages = (tuple(BlockKey(f"b{i}") for i in range(3)), (BlockKey("b3"),))
    reads = fresh_reads(graph, Partition("chain", stages), [1.0] * 4)
    assert [str(read.atom) for read in reads] == ["b0[0]"], "b1 ends just when stage 1 must begin"
    assert leads(reads) == ((0, 1, 1.0),)


@pytest.mark.parametrize("name", ["b0", "b0[x]", "[0]", "b0#a[0]", "b0[0] "])
def test_names_of_leaves_are_checked(name: str) -> None:
    plan = Plan("chain", (("b0",), ("b1",)), ("cpu", "cpu"), fresh=((name, 1),))
    with pytest.raises(ConfigurationError, match="no leaf"):
        _ = plan.fresh_atoms


def test_leaves_are_named_as_they_are_written() -> None:
    plan = Plan("chain", (("b0",), ("b1",)), ("cpu", "cpu"), fresh=(("a.b.0#2[3]", 1), ("c[0]", 1)))
    assert plan.fresh_atoms == {(Atom("a.b.0", 2, 3), 1), (Atom("c", 0, 0), 1)}


def test_a_plan_of_the_paper_lists_nothing() -> None:
    with pytest.raises(ConfigurationError, match="nothing fresh"):
        Plan("chain", (("b0",), ("b1",)), ("cpu", "cpu"), freshness="paper", fresh=(("b0[0]", 1),))
