"""All ways to use some devices, with times and limits worked out by hand."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from graphs import make_graph

from asyncdiff.config import Settings
from asyncdiff.errors import ConfigurationError
from asyncdiff.planner import (
    Candidate,
    Objective,
    Plan,
    choose_candidate,
    explain_choice,
    list_candidates,
    make_plan,
    simulate,
)
from asyncdiff.planner.candidates import bytes_per_step
from asyncdiff.simulation import Machine

# Four blocks of 3 s in a row, 10 bytes of weights each; 4 bytes from one to the next.
GRAPH = make_graph([3.0] * 4, [[], [0], [1], [2]], [3], [1] * 4)


HALF = make_graph([2.0] * 4, [[], [0], [1], [2]], [3], [1] * 4)
"""The same with half the batch."""


def make(num_stages: int, stride: int, groups: int = 1, guidance_refresh: int = 1) -> Plan:
    if groups > 1:
        raise ConfigurationError("a batch that cannot be shared")
    settings = Settings(num_stages, stride, guidance_refresh=guidance_refresh)
    graph = GRAPH if guidance_refresh == 1 else HALF
    return make_plan(graph, settings, ["cpu"] * settings.num_workers, driver_seconds=0.0)


def on(
    num_devices: int, num_steps: int = 10, warmups: tuple[int, ...] = (1,), **link: float
) -> tuple[Candidate, ...]:
    return list_candidates(make, Machine((1.0,) * num_devices, **link), num_steps, warmups)


def found(candidates: tuple[Candidate, ...]) -> dict[tuple[int, int, int], Candidate]:
    return {(c.plan.num_stages, c.plan.stride, c.plan.warmup_steps): c for c in candidates}


def test_times_are_those_of_the_method() -> None:
    """12 s a step in order. Two stages: w of these, then 6 s each; S copies: 12 s a round of S steps."""
    by_division = found(on(3, num_steps=13, warmups=(1, 3)))
    assert by_division[1, 1, 1].total_s == 13 * 12
    for w in (1, 3):
        assert by_division[2, 1, w].total_s == w * 12 + (13 - w) * 6
        assert by_division[1, 2, w].total_s == w * 12 + (13 - w) / 2 * 12
    assert by_division[1, 3, 1].total_s == 12 + 4 * 12
    assert by_division[2, 2, 1].total_s == 12 + 6 * 6
    assert by_division[2, 1, 1].speedup == pytest.approx(13 * 12 / (12 + 12 * 6))


def test_refreshed_guidance_takes_half_the_batch_once_more_every_kth_step() -> None:
    """8 s a half in order. Step 0: two halves one after the other, of which the second stage does one while
    the first does the other. Then every step 4 s on each of two devices, and every fourth step 4 s more."""
    candidates = list_candidates(make, Machine((1.0,) * 2), 13, (1, 3), (2, 4))
    refreshed = {
        (c.plan.num_stages, c.plan.guidance_refresh, c.plan.warmup_steps): c
        for c in candidates if c.plan.guidance_refresh > 1
    }  # fmt: skip
    assert refreshed.keys() == {(n, k, w) for n in (1, 2) for k in (2, 4) for w in (1, 3)}
    for k, w in itertools.product((2, 4), (1, 3)):
        assert refreshed[1, k, w].total_s == 8 * (13 + w + (13 - w) // k)
        assert refreshed[1, k, w].speedup == 13 * 12 / refreshed[1, k, w].total_s
    # Who reads the latents waits for the call: here both stages, so both do so in turn ...
    assert refreshed[2, 4, 1].total_s == 12 + 12 * 4 + 3 * (4 + 4)
    # ... and where the second stage reads none, it goes on with the first half meanwhile.
    plan = refreshed[2, 4, 1].plan
    assert plan.predictions is not None
    ahead = replace(plan, predictions=replace(plan.predictions, latents_stages=(0,)))
    assert simulate(ahead, Machine((1.0,) * 2), num_steps=13).total_s == 12 + 12 * 4 + 3 * 4
    assert bytes_per_step(plan) == 1.25 * bytes_per_step(replace(plan, guidance_refresh=1))


def test_ages_are_those_of_the_method() -> None:
    by_division = found(on(4))
    assert {key[:2]: each.staleness for key, each in by_division.items() if key[1] == 1} == {
        (1, 1): 0, (2, 1): 1, (3, 1): 2, (4, 1): 3,
    }  # fmt: skip
    # N=2, S=2: the second step of round b reads what was made for b in round b - 2; that of the first round
    # has only what was made in order.
    assert (by_division[2, 2, 1].staleness, by_division[2, 2, 1].read_staleness) == (3, 2)
    assert (by_division[1, 2, 1].staleness, by_division[1, 2, 1].read_staleness) == (1, 0)


def make_shared(num_stages: int, stride: int, groups: int, _: int = 1) -> Plan:
    settings = Settings(num_stages, stride, groups=groups)
    graph = GRAPH if groups == 1 else HALF
    return make_plan(graph, settings, ["cpu"] * settings.num_workers, driver_seconds=0.0)


def test_of_as_many_devices_groups_that_share_the_batch_come_first() -> None:
    """12 s a step in order, 8 s with half the batch; two stages of that 4 s each."""
    candidates = list_candidates(make_shared, Machine((1.0,) * 4), 10, (1, 2))
    shared = {
        (c.plan.num_stages, c.plan.stride, c.plan.warmup_steps): c for c in candidates if c.plan.groups == 2
    }
    assert [c.plan.groups for c in candidates if c.num_devices == 2] == [2, 1, 1, 1, 1]
    assert [c.plan.groups for c in candidates if c.num_devices == 4][:4] == [2] * 4
    assert shared[1, 1, 1].total_s == 10 * 8
    assert shared[1, 1, 1].speedup == 120 / 80
    assert shared[1, 1, 1].staleness == 0
    assert (1, 1, 2) not in shared, "in order whatever the warm-up"
    assert shared[2, 1, 1].total_s == 8 + 9 * 4
    assert shared[2, 1, 2].total_s == 2 * 8 + 8 * 4
    assert shared[2, 1, 1].staleness == 1
    assert shared[2, 1, 1].weight_bytes == (20, 20)


def test_a_slow_device_holds_up_all_groups() -> None:
    machine = Machine((1.0, 1.0, 1.0, 0.5))
    by_division = {
        (c.plan.groups, c.plan.num_stages, c.plan.stride): c
        for c in list_candidates(make_shared, machine, 10, (1,))
    }
    assert by_division[2, 2, 1].total_s == 4 + 8 + 9 * 8.0  # cut as if they were equal
    assert by_division[2, 1, 1].total_s == 10 * 8.0


def test_a_way_that_needs_more_blocks_than_there_are_is_left_out() -> None:
    assert max(each.plan.num_stages for each in on(6)) == 4


def test_devices_are_taken_in_order_and_weights_are_per_device() -> None:
    candidates = list_candidates(make, Machine((1.0, 0.5, 0.5)), 10, (1,))
    assert found(candidates)[1, 1, 1].total_s == 120.0
    assert found(candidates)[2, 1, 1].total_s == 6 + 12 + 9 * 12.0  # cut as if they were equal
    assert found(candidates)[2, 1, 1].weight_bytes == (20, 20)
    assert found(candidates)[1, 2, 1].weight_bytes == (40,)


def test_machine_s_slow_neighbours_do_not_slow_one_device_alone() -> None:
    by_division = found(on(2, busy_speed=0.5))
    assert by_division[1, 1, 1].total_s == 120.0
    assert by_division[2, 1, 1].total_s == 12 + 9 * 12.0


def test_traffic_counts_predictions_that_are_not_the_driver_s() -> None:
    """4 bytes of state to each copy of the last stage and 4 of prediction from each, per round."""
    graph = make_graph([3.0] * 4, [[], [0], [1], [2]], [3], [1] * 4)
    object.__setattr__(graph, "outputs", (graph.blocks[-1].outputs[0],))

    def sent(num_stages: int, stride: int, kind: str, groups: int = 1) -> float:
        settings = Settings(num_stages, stride, groups=groups)
        return bytes_per_step(make_plan(graph, settings, ["cpu"], kind=kind))

    assert sent(1, 1, "chain") == 0
    assert sent(1, 3, "chain") == pytest.approx(2 * 4 / 3)
    assert sent(2, 1, "chain") == 8
    assert sent(2, 2, "chain") == (2 * 4 + 2 * 4) / 2
    assert sent(2, 1, "nested") == 8  # to the inner stage and back
    assert sent(1, 1, "chain", groups=2) == 4  # of the second group
    assert sent(2, 1, "chain", groups=2) == 2 * 8
    assert sent(2, 1, "nested", groups=3) == 3 * 8 + 2 * 4


def test_fastest_within_the_limits_is_chosen() -> None:
    candidates = on(4, num_steps=50)
    by_division = found(candidates)

    def choice(**limits: float) -> tuple[int, int]:
        plan = choose_candidate(candidates, Objective(**limits)).plan
        return plan.num_stages, plan.stride

    fastest = min(candidates, key=lambda each: each.total_s)
    assert choice() == (fastest.plan.num_stages, fastest.plan.stride)
    assert choice(max_staleness=0) == (1, 1)
    assert by_division[*choice(max_staleness=1), 1].staleness == 1
    assert choice(max_memory_bytes=10) == (4, 1)
    assert choice(max_memory_bytes=39, max_staleness=1) == (2, 1)


def test_of_equally_fast_ones_fewer_devices_are_taken() -> None:
    """Nothing is faster than in order where all steps are warm-up."""
    assert choose_candidate(on(3, num_steps=2, warmups=(2,)), Objective()).num_devices == 1


def test_what_is_least_possible_is_said() -> None:
    with pytest.raises(ConfigurationError, match=r"within 1e-09 GB .*: the least memory is 1e-08 GB \(N=4"):
        choose_candidate(on(4), Objective(max_memory_bytes=1))
    with pytest.raises(
        ConfigurationError, match=r"within staleness 0 and 2e-08 GB .*the least staleness is 0"
    ):
        choose_candidate(on(2), Objective(max_staleness=0, max_memory_bytes=20))


@pytest.mark.parametrize(
    ("objective", "reason"),
    [
        (
            Objective(),
            "2 stages, stride 2 on 3 devices, 3.25x: what it reads is up to 3 steps old; the fastest, the "
            "next one (one stage, stride 3 on 3, what it reads is up to 2 steps old) takes 25% longer.",
        ),
        (
            Objective(max_staleness=1),
            "2 stages on 2 devices, 1.86x: what it reads is up to 1 step old; the fastest within the limits, "
            "the next one (one stage, stride 2 on 2, what it reads is up to 1 step old) takes as long.",
        ),
        (
            Objective(max_staleness=0),
            "one stage on 1 device, 1.00x: exact; nothing else is there within the limits.",
        ),
    ],
)
def test_choice_is_explained(objective: Objective, reason: str) -> None:
    candidates = on(3, num_steps=13)
    chosen = choose_candidate(candidates, objective)
    assert explain_choice(chosen, candidates, objective) == f"Chosen: {reason}"


def test_exact_ways_are_called_so() -> None:
    def make_groups(num_stages: int, stride: int, groups: int, guidance_refresh: int) -> Plan:
        settings = Settings(num_stages, stride, groups=groups, guidance_refresh=guidance_refresh)
        return make_plan(HALF, settings, ["cpu"] * settings.num_workers, driver_seconds=0.0)

    candidates = list_candidates(make_groups, Machine((1.0,) * 2), 13, (1,), (4,))
    of_groups = {(each.plan.groups, each.plan.guidance_refresh): each for each in candidates}
    assert ": exact; " in explain_choice(of_groups[2, 1], candidates, Objective())
    one = next(each for each in candidates if each.num_devices == 1 and each.plan.guidance_refresh == 4)
    assert "guidance evaluated in full every 4 steps on 1 device" in explain_choice(
        one, candidates, Objective()
    )
    assert ": only guidance is continued; " in explain_choice(one, candidates, Objective())
