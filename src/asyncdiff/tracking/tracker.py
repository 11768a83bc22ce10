"""The state machine that says where a denoiser call stands, from what the noise scheduler is asked to do.

Nothing here compares timestep *arguments* of the denoiser: they repeat (PNDM, Heun) and lose their digits
(t/1000 in bfloat16). Boundaries are events: `set_timesteps` opens a run, `step` closes a step, and the
denoiser calls between two closed steps are the channels of one step.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

Channel: TypeAlias = int | str
"""One of several denoiser calls of a step: cache-context name, else place among the unnamed calls."""

MAX_CALLS_PER_STEP = 32
"""More unnamed calls (or calls of one name) between two steps than this are not
channels: a loop without a noise scheduler step would otherwise open a new channel, with states of its own, at
every call."""

MAX_COUNT_CHANGES = 2
"""An interval of steps with one call more or less (skip-layer guidance, guidance within an interval) has two
edges. A number of calls that changes more often says that a place in the order does not identify a call."""


class Extent(NamedTuple):
    """How far a run reaches: the number of timesteps (None: unknown) and the index at which it begins."""

    num_timesteps: int | None
    first: int


Settle: TypeAlias = Callable[[object, int], Extent]
"""Called as `settle(hint, step)` at a run's first
denoiser call: `hint` is what `place` was given, `step` the number of steps closed before that call (not 0 for
the second of two denoisers that share the steps)."""


@dataclass(frozen=True)
class Position:
    """Where a denoiser call stands.

    `run` counts runs from 0 (-1: no run is open). `step` is 0-based within the run, `num_steps` the number of
    steps this run has (None: unknown). `timestep_index` is the step's place in `scheduler.timesteps`.
    `first_step` is the step since which this channel has been called at every step: where it is larger than
    the channel's last, states from before are not the previous step's and warm-up starts again (`step ==
    first_step`). Within a run, placed calls of one channel have `first_step`, `first_step` + 1, ... as steps.
    `new_run`, `new_step`: this is the first call of its run, of its step. `reason` says why the call could
    not be placed; such a call has to run in order, and neither reads states nor leaves any.
    """

    run: int
    step: int
    channel: Channel
    num_steps: int | None
    first_step: int
    timestep_index: int
    new_run: bool
    new_step: bool
    reason: str | None = None

    @property
    def placed(self) -> bool:
        return self.reason is None


@dataclass
class _Group:
    """The calls of one cache-context name (None: the unnamed), told apart by their order within a step."""

    calls: int = 0
    previous_calls: int = 0
    changes: int = 0
    first_steps: list[int] = field(default_factory=list)
    last_steps: list[int] = field(default_factory=list)

    def close_step(self) -> None:
        """Compare the number of calls with that of the step before: a change puts the order in doubt."""
        if self.calls and self.previous_calls and self.calls != self.previous_calls:
            self.changes += 1
            self.first_steps.clear()
            self.last_steps.clear()
        self.previous_calls, self.calls = self.calls, 0

    def follow(self, ordinal: int, step: int) -> int:
        """Note the call `ordinal` of `step`; the step since which it has been made at every one."""
        while len(self.first_steps) <= ordinal:
            self.first_steps.append(step)
            self.last_steps.append(step)
        if self.last_steps[ordinal] < step - 1:
            self.first_steps[ordinal] = step
        self.last_steps[ordinal] = step
        return self.first_steps[ordinal]


class Tracker:
    """Told the events of the noise scheduler, says where each denoiser call stands.

    `same_timestep(a, b)`: whether two timesteps handed to `step` one after the other mean the same step.

    Events carry a `source`, the noise scheduler they come from: the run belongs to the one that opened it,
    and steps of others are ignored. Not thread-safe: whoever calls the denoiser from two threads holds a
    lock.
    """

    def __init__(self, same_timestep: Callable[[object, object], bool] = operator.eq) -> None:
        self._same_timestep = same_timestep
        self._run = -1
        self._open = False
        self._run_is_new = False
        self._source: Hashable | None = None
        self._settle: Settle | None = None
        self._extent: Extent | None = None
        self._start_over()

    def _start_over(self) -> None:
        self._step = 0
        self._step_is_new = True
        self._closed_timestep: object = None
        self._groups: dict[str | None, _Group] = {}

    def open_run(self, extent: Extent | Settle, source: Hashable | None = None) -> None:
        """The timesteps were set: what was running is over, the next denoiser call is the first of a new run.

        `extent` may be a function that is called at that call: pipelines set the begin index after the
        timesteps. Opening twice without a call in between opens one run, the second.
        """
        self._open = True
        self._source = source
        self._settle, self._extent = (None, extent) if isinstance(extent, Extent) else (extent, None)
        self._run_is_new = True
        self._start_over()

    def close_run(self, source: Hashable | None = None) -> None:
        """Forget the run that `source` opened; calls are not placed until the next `open_run`."""
        if self._open and source == self._source:
            self._open = False

    def close_step(self, timestep: object = None, source: Hashable | None = None) -> None:
        """The noise scheduler made a step; `timestep` is what it was given (None: unknown).

        Without a denoiser call since the last one this is either the same step for another part of the
        latents (one call of `step` per image, view or modality: the same timestep) or a step without
        evaluation (another one).
        """
        if not self._open or source != self._source:
            return
        if self._step_is_new and self._repeats_step(timestep):
            return
        self._step += 1
        self._step_is_new = True
        self._closed_timestep = timestep
        for group in self._groups.values():
            group.close_step()

    def _repeats_step(self, timestep: object) -> bool:
        """Whether a `step` without a denoiser call before it belongs to the step closed last.

        The first one of a run belongs to a step that this denoiser was not called for (another one was).
        """
        if self._step == 0:
            return False
        if timestep is None or self._closed_timestep is None:
            return True
        return self._same_timestep(timestep, self._closed_timestep)

    def place(self, context: str | None = None, hint: object = None) -> Position:
        """Where the denoiser call that is being made stands.

        `context` is diffusers' cache-context name, where the pipeline gives one. `hint` is handed to the
        function given to `open_run`.
        """
        if not self._open:
            return Position(self._run, 0, context or 0, None, 0, 0, False, False, "no run is open")
        new_run, new_step = self._run_is_new, self._step_is_new
        if new_run:
            self._run += 1
            self._run_is_new = False
        self._step_is_new = False
        if self._extent is None:
            assert self._settle is not None
            self._extent = self._settle(hint, self._step)
        group = self._groups.setdefault(context, _Group())
        ordinal, group.calls = group.calls, group.calls + 1
        num_steps = _num_steps(self._extent)
        reason = self._why_not_placed(group, ordinal, num_steps)
        return Position(
            run=self._run,
            step=self._step,
            channel=_channel(context, ordinal),
            num_steps=num_steps,
            first_step=self._step if reason else group.follow(ordinal, self._step),
            timestep_index=self._extent.first + self._step,
            new_run=new_run,
            new_step=new_step,
            reason=reason,
        )

    def _why_not_placed(self, group: _Group, ordinal: int, num_steps: int | None) -> str | None:
        if num_steps is not None and self._step >= num_steps:
            return f"the run has {num_steps} steps and all of them are over"
        if ordinal >= MAX_CALLS_PER_STEP:
            return f"more than {MAX_CALLS_PER_STEP} calls since the noise scheduler's last step"
        if group.changes > MAX_COUNT_CHANGES:
            return f"the number of denoiser calls per step has changed {group.changes} times in this run"
        return None


def _num_steps(extent: Extent) -> int | None:
    return None if extent.num_timesteps is None else max(extent.num_timesteps - extent.first, 0)


def _channel(context: str | None, ordinal: int) -> Channel:
    if context is None:
        return ordinal
    return context if ordinal == 0 else f"{context}#{ordinal}"
