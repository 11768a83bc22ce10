"""Which kind of partition is chosen where the user has not said."""

from __future__ import annotations

import pytest
from graphs import make_graph

from asyncdiff.config import Settings
from asyncdiff.errors import ConfigurationError
from asyncdiff.graph import BlockGraph
from asyncdiff.planner import Plan, choose_plan, make_plan


def chosen(graph: BlockGraph, num_stages: int) -> Plan:
    def make(kind: str, share: float | None) -> Plan:
        return make_plan(graph, Settings(num_stages), ["cpu"], kind=kind, max_weight_share=share)

    return choose_plan([make], num_stages)


def unet_like() -> BlockGraph:
    """Eight blocks of equal work, the last three reading one of the first three too, the weights in the
    middle.
    """
    reads = [[], [0], [1], [2], [3], [4, 2], [5, 1], [6, 0]]
    return make_graph([1.0] * 8, reads, [7], [1] * 8, weights=[1, 1, 5, 5, 20, 20, 1, 1])


def trunk(sizes: list[int], weights: list[int]) -> BlockGraph:
    """Blocks of equal work in a row."""
    reads = [[], *([i] for i in range(len(sizes) - 1))]
    return make_graph([1.0] * len(sizes), reads, [len(sizes) - 1], sizes, weights=weights)


def largest_share(plan: Plan) -> float:
    assert plan.predictions is not None
    return max(plan.predictions.parameter_bytes) / sum(plan.predictions.parameter_bytes)


def test_equally_fast_kinds_are_decided_by_the_weights() -> None:
    plan = chosen(unet_like(), 2)
    assert plan.kind == "nested"
    assert (
        largest_share(plan) < 0.6 < largest_share(make_plan(unet_like(), Settings(2), ["cpu"], kind="chain"))
    )
    assert plan.predictions is not None
    assert plan.predictions.balance == pytest.approx(1.0)


def test_equal_weights_are_decided_by_the_traffic() -> None:
    assert chosen(trunk([1] * 8, [1] * 8), 2).kind == "chain"  # one boundary instead of two


def test_speed_comes_before_the_weights() -> None:
    """Half of the weights would fit on each device only by giving one three quarters of the work."""
    graph = make_graph([3.0, 3.0, 1.0, 1.0], [[], [0], [1], [2]], [3], [1] * 4, weights=[1, 1, 40, 40])
    plan = chosen(graph, 2)
    assert plan.predictions is not None
    assert max(plan.predictions.stage_seconds) == pytest.approx(4.0, rel=0.26)
    assert plan.predictions.balance <= 1.02 * min(
        candidate.predictions.balance
        for kind in ("chain", "nested")
        if (candidate := make_plan(graph, Settings(2), ["cpu"], kind=kind)).predictions is not None
    )


def test_traffic_is_not_multiplied_for_a_little_weight() -> None:
    """A second boundary would even out the weights, and double what crosses."""
    graph = trunk([1] * 8, [1, 1, 1, 1, 20, 20, 1, 1])
    assert chosen(graph, 2).kind == "chain"


def test_a_kind_that_no_device_can_hold_is_left_out() -> None:
    """A chain's halves hold at least 32 of 54; a nested split can keep to 56 %."""

    def make(kind: str, share: float | None) -> Plan:
        limit = min(0.56, 1.0 if share is None else share)
        return make_plan(unet_like(), Settings(2), ["cpu"], kind=kind, max_weight_share=limit)

    with pytest.raises(ConfigurationError, match="given share"):
        make("chain", None)
    plan = choose_plan([make], 2)
    assert plan.kind == "nested"
    assert largest_share(plan) <= 0.56


def test_one_stage_is_a_chain() -> None:
    assert chosen(unet_like(), 1).kind == "chain"


def test_what_is_in_the_way_is_said() -> None:
    with pytest.raises(ConfigurationError, match="needs at least 9 blocks"):
        chosen(unet_like(), 9)
