"""How long steps take with a ControlNet, worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from graphs import make_graph

from asyncdiff.config import Settings
from asyncdiff.errors import ConfigurationError
from asyncdiff.planner import (
    ControlNetCandidates,
    ControlNetCost,
    Plan,
    list_candidates,
    make_plan,
    seconds_before_reading,
    step_seconds,
)
from asyncdiff.simulation import Machine

# Four blocks of 3 s in a row; the third reads what the ControlNet returns.
GRAPH = make_graph([3.0] * 4, [[], [0], [1], [2]], [3], [1] * 4)
GRAPH = replace(
    GRAPH,
    blocks=tuple(
        replace(block, inputs=("sample", "residual") if index >= 2 else ("sample",))
        for index, block in enumerate(GRAPH.blocks)
    ),
)
READ_AFTER_S = 6.0


def planned(num_stages: int, groups: int = 1, *, driver_seconds: float = 0.0) -> Plan:
    settings = Settings(num_stages, groups=groups)
    return make_plan(GRAPH, settings, ["cpu"] * settings.num_workers, driver_seconds=driver_seconds)


def seconds(
    plan: Plan, controlnet_s: float, *, ahead: bool, speeds: tuple[float, ...] = (), **machine: float
) -> tuple[float, ...]:
    cost = ControlNetCost(controlnet_s, 10, READ_AFTER_S)
    devices = speeds or (1.0,) * (plan.num_workers + 1)
    return step_seconds(plan, Machine(devices, **machine), cost, ahead=ahead, num_steps=6)


def test_denoiser_computes_until_it_reads_a_residual() -> None:
    assert seconds_before_reading(GRAPH, [1.0, 2.0, 4.0, 8.0], {"residual"}) == 3.0
    assert seconds_before_reading(GRAPH, [1.0, 2.0, 4.0, 8.0], {"sample"}) == 0.0


@pytest.mark.parametrize(("controlnet_s", "step_s"), [(2.0, 12.0), (6.0, 12.0), (8.0, 14.0), (20.0, 26.0)])
def test_overlap_costs_what_comes_too_late(controlnet_s: float, step_s: float) -> None:
    assert seconds(planned(1), controlnet_s, ahead=False) == (step_s,) * 6


@pytest.mark.parametrize(("controlnet_s", "step_s"), [(2.0, 12.0), (8.0, 12.0), (20.0, 20.0)])
def test_ahead_takes_as_long_as_the_slower_of_both(controlnet_s: float, step_s: float) -> None:
    exact = seconds(planned(1), controlnet_s, ahead=False)[0]
    assert seconds(planned(1), controlnet_s, ahead=True) == (exact,) * 2 + (step_s,) * 4


def test_warmup_is_exact() -> None:
    warmed = replace(planned(1), warmup_steps=3)
    assert seconds(warmed, 20.0, ahead=True) == (26.0,) * 4 + (20.0,) * 2


def test_what_crosses_takes_time() -> None:
    link = {"latency_s": 1.0, "bandwidth_bytes_per_s": 10.0}  # 2 s for what the ControlNet returns
    assert seconds(planned(1), 6.0, ahead=False, **link) == (14.0,) * 6
    assert seconds(planned(1), 15.0, ahead=True, **link)[2:] == (17.0,) * 4


def test_devices_have_their_own_speeds() -> None:
    assert seconds(planned(1), 8.0, ahead=False, speeds=(1.0, 2.0)) == (12.0,) * 6
    assert seconds(planned(1), 8.0, ahead=False, speeds=(2.0, 1.0)) == pytest.approx([11.0] * 6)


def test_neighbours_slow_each_other_down_while_both_are_at_work() -> None:
    """The ControlNet's 4 s take 5; of the denoiser's 12 s, 4 are done in those 5."""
    made = seconds(planned(1), 4.0, ahead=True, busy_speed=0.8)
    assert made[-1] == pytest.approx(13.0)
    # 6 s take 7.5, and so does the denoiser until it reads what they give.
    assert seconds(planned(1), 6.0, ahead=False, busy_speed=0.8)[-1] == pytest.approx(13.5)


def test_halves_of_guidance_begin_without_residuals_too() -> None:
    assert seconds(planned(1, 2), 6.0, ahead=False) == (12.0,) * 6
    assert seconds(planned(1, 2), 9.0, ahead=False) == (15.0,) * 6
    assert seconds(planned(1, 2), 9.0, ahead=True)[2:] == (12.0,) * 4


def test_stages_wait_for_the_controlnet_unless_it_is_ahead() -> None:
    """Two stages of 6 s each."""
    assert seconds(planned(2), 5.0, ahead=False)[2:-1] == (11.0,) * 3
    assert seconds(planned(2), 5.0, ahead=True)[2:-1] == (6.0,) * 3
    assert seconds(planned(2), 7.0, ahead=True)[2:-1] == (7.0,) * 3


def test_machine_must_have_a_device_for_it() -> None:
    with pytest.raises(ConfigurationError, match="needs a machine of 3 devices, but it has 2"):
        seconds(planned(2), 5.0, ahead=False, speeds=(1.0, 1.0))


def test_candidates_with_a_device_for_it_are_listed() -> None:
    def in_driver(num_stages: int, stride: int, groups: int, guidance_refresh: int) -> Plan:
        if groups > 1 or stride > 1 or guidance_refresh > 1:
            raise ConfigurationError("not here")
        return planned(num_stages, driver_seconds=6.0)

    def beside(num_stages: int, stride: int, groups: int) -> Plan:
        if groups > 1 or stride > 1:
            raise ConfigurationError("not here")
        return planned(num_stages)

    controlnet = ControlNetCandidates(beside, lambda groups: ControlNetCost(6.0, 10, READ_AFTER_S))
    found = list_candidates(in_driver, Machine((1.0,) * 3), 20, (1,), controlnet=controlnet)
    by_way = {(each.controlnet, each.plan.num_stages): each for each in found}
    assert by_way.keys() == {
        *(("serial", n) for n in (1, 2, 3)), ("overlap", 1), ("ahead", 1), ("overlap", 2), ("ahead", 2),
    }  # fmt: skip
    assert by_way["serial", 1].total_s == 20 * 18
    assert by_way["overlap", 1].total_s == 20 * 12
    assert by_way["overlap", 1].speedup == pytest.approx(18 / 12)
    assert by_way["ahead", 2].num_devices == by_way["overlap", 2].num_devices == 3
    assert (by_way["overlap", 1].staleness, by_way["ahead", 1].staleness) == (0, 1)
    assert by_way["overlap", 1].bytes_per_step - by_way["serial", 1].bytes_per_step == 10
    assert [each.num_devices for each in found] == sorted(each.num_devices for each in found)
