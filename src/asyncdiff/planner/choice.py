"""Choosing between kinds of partition, where the user has not.

Speed first, then the weights each device must hold, then traffic. A chain puts three quarters of Stable
Diffusion 2.1's weights on one of two devices, because the layers in the middle have most of the weights and
little of the work; a nested split of the same balance can halve both, with fewer bytes crossing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from asyncdiff.errors import ConfigurationError
from asyncdiff.planner.plan import Plan
from asyncdiff.schedule.builder import KINDS

SLOWER = 0.02
"""How much slower, relatively, the largest stage may be than in the fastest partition, if devices hold
less.
"""

MORE_TRAFFIC = 1.25
"""How many times the crossing bytes of the first maker's chain may cross, if devices hold less."""

WEIGHT_LEVELS = (1.06, 1.2, 1.4, 1.7)
"""Largest shares of the weights, in units of an even share, that are tried in turn."""

PlanOfKind = Callable[[str, float | None], Plan]


def choose_plan(makers: Sequence[PlanOfKind], num_stages: int) -> Plan:
    """The plan to use among those of several graphs and kinds of partition.

    Each maker gives the best plan of a kind ("chain", "nested") under a largest weight share (None: any that
    the devices can hold), or raises `ConfigurationError` where there is none. Of those that are within
    `SLOWER` and `MORE_TRAFFIC`, the first level of `WEIGHT_LEVELS` that any of them keeps decides, and at one
    level the fewest crossing bytes.
    """
    free = [] if num_stages == 1 else list(_plans(makers, None))
    if not free:
        return makers[0](KINDS[0], None)  # one stage; or raises what is in the way
    slowest = min(map(_largest_stage_s, free)) * (1.0 + SLOWER)
    most_bytes = _chain_bytes(makers[0]) * MORE_TRAFFIC
    for level in (*(level / num_stages for level in WEIGHT_LEVELS), None):
        plans = [
            plan
            for plan in _plans(makers, level)
            if _largest_stage_s(plan) <= slowest and _crossing_bytes(plan) <= most_bytes
        ]
        if plans:
            return min(plans, key=_crossing_bytes)
    return min(free, key=_largest_stage_s)


def _chain_bytes(make: PlanOfKind) -> float:
    """Of the maker's chain; no limit where it has none."""
    try:
        return _crossing_bytes(make(KINDS[0], None))
    except ConfigurationError:
        return math.inf


def _plans(makers: Sequence[PlanOfKind], max_weight_share: float | None) -> Iterator[Plan]:
    for make in makers:
        for kind in KINDS:
            try:
                yield make(kind, max_weight_share)
            except ConfigurationError:
                continue  # too few blocks for this kind, or none within the share


def _largest_stage_s(plan: Plan) -> float:
    assert plan.predictions is not None
    return max(plan.predictions.stage_seconds)


def _crossing_bytes(plan: Plan) -> float:
    assert plan.predictions is not None
    return plan.predictions.crossing_bytes_per_step
