"""How old what a prediction rests on is."""

from __future__ import annotations

from dataclasses import dataclass

from asyncdiff.schedule.ops import Compute, Value
from asyncdiff.schedule.rounds import Schedule


@dataclass(frozen=True)
class StepStaleness:
    """How old what the prediction for `step` rests on is; in steps, 0 is fresh.

    `reads`: (segment, staleness) of the newest version of each foreign state that the predicting segment
    reads; staleness is the reader's step minus the value's step. `latents`: how many steps before `step` the
    oldest latents lie that it rests on, along newest versions.
    """

    step: int
    reads: tuple[tuple[int, int], ...]
    latents: int

    @property
    def largest_read(self) -> int:
        """The staleness of the oldest state read; 0 where none is."""
        return max((age for _, age in self.reads), default=0)


def staleness(schedule: Schedule) -> tuple[StepStaleness, ...]:
    """One entry per step that is predicted, in order."""
    oldest: dict[Value, int] = {}  # value -> the oldest latents it rests on
    found: list[StepStaleness] = []
    starts: dict[tuple[int, int], int] = {}  # (rank, step) -> oldest latents of E in the same forward
    # By segment within a round: within one round, only later segments read earlier ones.
    for _, rank, op in sorted(schedule.computes(), key=lambda entry: (entry[0].first_step, entry[2].segment)):
        own = starts.get((rank, op.step), op.input_step)
        oldest[op.value] = starts[rank, op.step] = min([own, *(oldest[read.newest] for read in op.reads)])
        if op.segment == schedule.num_segments - 1:
            found.append(StepStaleness(op.step, _ages(op), op.step - oldest[op.value]))
    return tuple(sorted(found, key=lambda entry: entry.step))


def _ages(op: Compute) -> tuple[tuple[int, int], ...]:
    return tuple((read.segment, op.step - read.newest.step) for read in op.reads)
