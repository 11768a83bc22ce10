"""Which run a denoiser call belongs to, over all noise schedulers that have ever driven the denoiser.

Each noise scheduler has a tracker, because runs of several may alternate (two pipelines that share a
denoiser, two threads). They are held weakly: a server that makes one per request keeps none of them alive
here.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import Any

from asyncdiff.pipeline.noise_scheduler import (
    is_watched,
    new_run_number,
    new_tracker,
    run_number_of,
    unwatch,
    watch,
)
from asyncdiff.pipeline.scheduler_lookup import noise_scheduler_of
from asyncdiff.pipeline.timesteps import TimestepMemory
from asyncdiff.tracking import Position, Tracker


@dataclass(frozen=True)
class PlacedCall:
    """Where a call stands. `run`: its number, the same for every denoiser that one run of a noise scheduler
    calls; `is_new_run`: nothing of it was seen before; `timesteps`: what is known of how its noise
    scheduler's timesteps become the denoiser's."""

    position: Position
    run: int
    is_new_run: bool
    scheduler: Any
    timesteps: TimestepMemory


@dataclass
class _Driver:
    """A noise scheduler's tracker, and which number the tracker's current run has here."""

    tracker: Tracker
    timesteps: TimestepMemory
    tracker_run: int = -1
    run: int = -1


class Runs:
    """Knows the runs of a denoiser, and which of them are over. The caller holds a lock.

    `name`: the denoiser's in its pipeline. `timestep_scales`: factors that may lie between the noise
    scheduler's timestep and the denoiser's.
    """

    def __init__(self, name: str, timestep_scales: tuple[float, ...] = ()) -> None:
        self._name = name
        self._timestep_scales = timestep_scales
        self._drivers: weakref.WeakKeyDictionary[Any, _Driver] = weakref.WeakKeyDictionary()
        self._open: dict[int, tuple[weakref.ref[Any], ...]] = {}
        self._ended: list[int] = []

    def listen(self, pipe: Any) -> None:
        """Hear of the runs that a pipeline's noise scheduler begins from now on."""
        scheduler = noise_scheduler_of(pipe, self._name)
        if scheduler is not None:
            self._driver_of(scheduler, run_is_open=False)

    def place(self, pipe: Any, context: str | None, argument: Any) -> PlacedCall:
        """Where the call that `pipe` is making stands. `context`: diffusers' cache-context name; `argument`:
        the denoiser's timestep. A call that cannot be placed is a run of its own."""
        scheduler = noise_scheduler_of(pipe, self._name)
        if scheduler is None:
            return self._unplaced(_nowhere("the pipeline has no noise scheduler"), None, self._memory(None))
        driver = self._driver_of(scheduler, run_is_open=True)
        position = driver.tracker.place(context, hint=argument)
        if position.placed and position.num_steps is None:
            position = replace(position, reason="the noise scheduler does not say how many steps the run has")
        if not position.placed:
            return self._unplaced(position, scheduler, driver.timesteps)
        is_new = driver.tracker_run != position.run
        if is_new:
            driver.tracker_run, driver.run = position.run, run_number_of(scheduler)
            driver.timesteps.begin_run()
            self._begin(driver.run, pipe, scheduler)
        return PlacedCall(position, driver.run, is_new, scheduler, driver.timesteps)

    def take_ended(self) -> tuple[int, ...]:
        """The runs that have ended since this was asked last: nothing of them will be used again."""
        ended, self._ended = tuple(self._ended), []
        return ended

    def close(self) -> None:
        """Listen to no noise scheduler any more; each is as it was."""
        for scheduler, driver in list(self._drivers.items()):
            unwatch(scheduler, driver.tracker)
        self._drivers.clear()

    def _driver_of(self, scheduler: Any, *, run_is_open: bool) -> _Driver:
        driver = self._drivers.get(scheduler)
        if driver is None:
            driver = self._drivers[scheduler] = _Driver(new_tracker(), self._memory(scheduler))
        if not is_watched(scheduler, driver.tracker):
            watch(scheduler, driver.tracker, run_is_open=run_is_open)
        return driver

    def _memory(self, scheduler: Any | None) -> TimestepMemory:
        config = getattr(scheduler, "config", {})
        return TimestepMemory(int(config.get("num_train_timesteps", 1000)), self._timestep_scales)

    def _unplaced(self, position: Position, scheduler: Any | None, timesteps: TimestepMemory) -> PlacedCall:
        run = new_run_number()
        self._begin(run, None, None)
        return PlacedCall(position, run, True, scheduler, timesteps)

    def _begin(self, run: int, *owners: Any) -> None:
        """Note an open run of a pipeline and a noise scheduler, either of which has one open run at most;
        none for a call that could not be placed, which is over by now. Runs whose noise scheduler is gone are
        over too."""
        over = [
            number
            for number, references in self._open.items()
            if any((owner := reference()) is None or owner in owners for reference in references)
            or not references
        ]
        for number in over:
            del self._open[number]
        self._ended.extend(over)
        self._open[run] = tuple(weakref.ref(owner) for owner in owners if owner is not None)


def _nowhere(reason: str) -> Position:
    return Position(-1, 0, 0, None, 0, 0, False, False, reason)
