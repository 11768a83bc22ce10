"""Where to cut: the least possible largest stage, then the fewest bytes that cross, both exact.

The least largest stage is found by bisection on a limit: dynamic programming from the last stage to the first
says how far the stages reach under it. Within that limit (and a tolerance on top) dynamic programming over
cut points finds the fewest crossing bytes: they are a sum over stages.

n blocks, N stages; `cuts` are positions between blocks, stage k of a chain holding [cuts[k], cuts[k + 1]).
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeAlias

from asyncdiff.errors import ConfigurationError
from asyncdiff.planner.crossing import EnteringBytes

_ROUNDING = 1e-9  # relative: differences of prefix sums are not exact

# (crossing bytes, sum of squared seconds) and cuts: bytes decide, and at equal bytes the most even stages.
_Choice: TypeAlias = tuple[tuple[float, float], tuple[int, ...]]


def first_stage_seconds(work: float, speed: float, driver_speed: float, driver_seconds: float) -> float:
    """What stage 0 takes: its slowest device (of `speed`), or the driver's, with the driver's own work."""
    return max(work / speed, work / driver_speed + driver_seconds)


@dataclass(frozen=True)
class Load:
    """The work to divide. `prefix[i]`: seconds of the first i blocks; `fixed`: seconds that every stage adds.

    `speeds`: of each stage's (slowest) device, in stage order. `weights[i]`: bytes of the weights of the
    first i blocks; `most_weights`: what a stage may hold of them. `driver_seconds`: what the driver's device,
    of `driver_speed` and the (first) one of stage 0, has to do beside its stage, at whatever speed.
    """

    prefix: tuple[float, ...]
    fixed: float
    speeds: tuple[float, ...]
    weights: tuple[float, ...]
    most_weights: float
    driver_speed: float
    driver_seconds: float

    @classmethod
    def of(
        cls,
        seconds: Sequence[float],
        fixed: float,
        speeds: Sequence[float],
        weights: Sequence[float] | None = None,
        most_weights: float = math.inf,
        *,
        driver_speed: float | None = None,
        driver_seconds: float = 0.0,
    ) -> Load:
        held = weights or [0.0] * len(seconds)
        return cls(
            prefix=tuple(accumulate(seconds, initial=0.0)),
            fixed=fixed,
            speeds=tuple(speeds),
            weights=tuple(accumulate(held, initial=0.0)),
            most_weights=most_weights * (1.0 + _ROUNDING),
            driver_speed=speeds[0] if driver_speed is None else driver_speed,
            driver_seconds=driver_seconds,
        )

    @property
    def num_blocks(self) -> int:
        return len(self.prefix) - 1

    def seconds_of(self, stage: int, work: float) -> float:
        """So many seconds of blocks on the device of a stage, with what comes on top."""
        if stage == 0:
            return first_stage_seconds(
                work + self.fixed, self.speeds[0], self.driver_speed, self.driver_seconds
            )
        return (work + self.fixed) / self.speeds[stage]

    def room(self, stage: int, limit: float) -> float:
        """How many seconds of blocks fit a stage that may take `limit`."""
        work = limit * self.speeds[stage]
        if stage == 0:
            work = min(work, (limit - self.driver_seconds) * self.driver_speed)
        return work - self.fixed

    def stage_seconds(self, stage: int, start: int, end: int) -> float:
        """Blocks [start, end) on the device of a stage."""
        return self.seconds_of(stage, self.prefix[end] - self.prefix[start])

    def holds(self, start: int, end: int) -> bool:
        """Whether a device can hold the weights of the blocks [start, end)."""
        return self.weights[end] - self.weights[start] <= self.most_weights

    def outer_holds(self, start: int, end: int) -> bool:
        """Whether the device of stage 0 can hold those of all other blocks."""
        return self.weights[start] + self.weights[-1] - self.weights[end] <= self.most_weights

    def outer_seconds(self, start: int, end: int) -> float:
        """All blocks but [start, end) on the device of stage 0."""
        return self.seconds_of(0, self.prefix[start] + self.prefix[-1] - self.prefix[end])


def chain_cuts(load: Load, entering: EnteringBytes, *, copies: int, imbalance: float) -> tuple[int, ...]:
    """Cut points 0 = c_0 < ... < c_N = n of a chain; `copies` of the last stage receive what enters it."""
    n, stages = load.num_blocks, range(len(load.speeds))

    def fits(limit: float) -> bool:
        return _furthest(load, stages, limit, reserve=0)[0] == n

    limit = _least_limit(load, fits) * (1.0 + imbalance)
    _refuse_infinite(limit)
    weights = [1] * (len(stages) - 1) + [copies]
    _, cuts = _fewest_bytes(load, entering, stages, weights, 0, limit, load.prefix[-1])[n]
    return cuts


def nested_cuts(load: Load, entering: EnteringBytes, *, copies: int, imbalance: float) -> tuple[int, ...]:
    """Cut points c_0 < ... < c_{N-1} of the inner stages 1 to N-1; stage 0 holds the blocks before and after.

    `copies` of stage 0 receive what enters the blocks after the inner ones.
    """
    stages = range(1, len(load.speeds))

    def fits(limit: float) -> bool:
        return any(_nested_starts(load, stages, limit))

    limit = _least_limit(load, fits) * (1.0 + imbalance)
    _refuse_infinite(limit)
    return min(_nested_candidates(load, entering, stages, copies, limit))[1]


def _refuse_infinite(limit: float) -> None:
    if math.isinf(limit):
        raise ConfigurationError(
            "No partition of this kind keeps every device within the given share of the weights. Allow more, "
            "or use more stages or another kind."
        )


def _nested_starts(load: Load, stages: range, limit: float) -> Iterator[int]:
    """Where the inner stages can begin so that no stage exceeds the limit."""
    furthest = _furthest(load, stages, limit, reserve=1)
    for start in range(1, load.num_blocks):
        # Outer stage: the further the inner ones reach, the less is left for it.
        end = furthest[start]
        if end and load.outer_seconds(start, end) <= limit and load.outer_holds(start, end):
            yield start


def _nested_candidates(
    load: Load, entering: EnteringBytes, stages: range, copies: int, limit: float
) -> Iterator[_Choice]:
    """For every start of the inner blocks and every end within the limit, the best cuts between."""
    for start in _nested_starts(load, stages, limit):
        least = load.prefix[start] + load.prefix[-1] - load.room(0, limit)
        inner = _fewest_bytes(load, entering, stages, [1] * len(stages), start, limit, least)
        for end, ((num_bytes, squares), cuts) in inner.items():
            outer_s = load.outer_seconds(start, end)
            if end < load.num_blocks and outer_s <= limit and load.outer_holds(start, end):
                yield (num_bytes + copies * entering.around(start, end), squares + outer_s**2), cuts


def _least_limit(load: Load, fits: Callable[[float], bool]) -> float:
    """The least limit on the stages' seconds under which a partition fits, up to rounding; infinite if
    none does.
    """
    low, high = 0.0, (load.prefix[-1] + load.fixed) / min(load.speeds) + load.driver_seconds
    if not fits(high * (1.0 + _ROUNDING)):
        return math.inf
    while high - low > _ROUNDING / 10 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high * (1.0 + _ROUNDING)


def _furthest(load: Load, stages: range, limit: float, *, reserve: int) -> list[int]:
    """For every position, the furthest end that stages starting there reach; 0 where they do not fit.

    Each stage has at least one block and stays within the limit; `reserve` blocks are left over at the end.
    Filling each stage in turn as far as it goes would be simpler and is wrong: with devices of unequal
    speeds it can leave a slow one before a block that only the next can take.
    """
    n = load.num_blocks
    reach = [*range(n + 1 - reserve), *[0] * reserve]
    for stage in reversed(stages):
        room = load.room(stage, limit)
        ends = [
            min(
                bisect_right(load.prefix, seconds + room),
                bisect_right(load.weights, held + load.most_weights),
            )
            for seconds, held in zip(load.prefix, load.weights, strict=True)
        ]
        reach = [max(reach[start + 1 : end], default=0) for start, end in enumerate(ends)]
    return reach


def _fewest_bytes(
    load: Load,
    entering: EnteringBytes,
    stages: range,
    weights: Sequence[int],
    start: int,
    limit: float,
    least: float,
) -> dict[int, _Choice]:
    """End of the stages -> the fewest bytes entering them, the least sum of squared seconds, and the cuts.

    `weights`: how many devices receive what enters each stage. `least`: the seconds of the blocks before the
    end, of those ends that are asked for. Stages that would leave more for the rest than it may take are not
    tried: with 470 blocks in 4 stages, all but one of a hundred.
    """
    best: dict[int, _Choice] = {start: ((0.0, 0.0), (start,))}
    rooms = [load.room(stage, limit) for stage in stages]
    for position, (stage, weight) in enumerate(zip(stages, weights, strict=True)):
        enough = (least - sum(rooms[position + 1 :])) - _ROUNDING * load.prefix[-1]
        first_end = bisect_left(load.prefix, enough)
        following: dict[int, _Choice] = {}
        for begin, ((num_bytes, squares), cuts) in best.items():
            for end in range(max(begin + 1, first_end), load.num_blocks + 1):
                seconds = load.stage_seconds(stage, begin, end)
                if seconds > limit or not load.holds(begin, end):
                    break
                cost = (num_bytes + weight * entering.before(begin, end), squares + seconds**2)
                if end not in following or cost < following[end][0]:
                    following[end] = (cost, (*cuts, end))
        best = following
    return best
