"""A schedule: rounds of operations, one list per worker, and who runs which stage."""

from __future__ import annotations

import pickle
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

from asyncdiff.schedule.ops import Compute, Op


@dataclass(frozen=True)
class Round:
    """One exchange: what every worker does for the steps that share it.

    `steps` are predicted in it, as far as they are asked for, starting with `first_step`. `in_order`: a
    warm-up round of one step, whose stages run one after the other on fresh values. `ops[rank]` are that
    worker's operations in execution order.
    """

    first_step: int
    steps: tuple[int, ...]
    in_order: bool
    ops: tuple[tuple[Op, ...], ...]

    @cached_property
    def steps_ahead(self) -> frozenset[int]:
        """The steps to come for which it continues the latents."""
        return frozenset(
            op.latents_step
            for ops in self.ops
            for op in ops
            if isinstance(op, Compute) and op.latents_step != op.input_step
        )

    @cached_property
    def condition_steps(self) -> tuple[int, ...]:
        """The steps whose timesteps its evaluations are given."""
        return tuple({op.condition_step for ops in self.ops for op in ops if isinstance(op, Compute)})

    @cached_property
    def packed(self) -> tuple[bytes, ...]:
        """Every worker's operations as they travel; made once for all runs that have this round."""
        return tuple(pickle.dumps(ops, protocol=5) for ops in self.ops)


@lru_cache(maxsize=1024)
def unpacked(ops: bytes) -> tuple[Op, ...]:
    """A worker's operations, from `Round.packed`; kept, because the next run probably has the same."""
    found: tuple[Op, ...] = pickle.loads(ops)
    return found


@dataclass(frozen=True)
class Schedule:
    """Who computes, sends and reads which value when, for steps `first_step` to `num_steps - 1` of a run.

    Built by `build_schedule` from settings of the same names. Segments are numbered in execution order;
    `segment_stage[i]` is the stage that runs segment i (a chain: i; a nested split: stage 0 runs the first
    and the last). The driver is rank 0 and holds stage 0, or (not `driver_computes`) no stage: then it only
    hands predictions over, and the workers are the ranks from 1 on.
    """

    kind: str
    num_stages: int
    stride: int
    warmup_steps: int
    num_steps: int
    first_step: int
    time_shift: bool
    forecast: str
    freshness: str
    segment_stage: tuple[int, ...]
    rounds: tuple[Round, ...]
    driver_computes: bool = True
    refresh_every: int = 1

    @property
    def num_workers(self) -> int:
        """How many ranks compute."""
        return self.num_stages + self.stride - 1

    @property
    def first_worker(self) -> int:
        """The rank of stage 0."""
        return 0 if self.driver_computes else 1

    @property
    def num_ranks(self) -> int:
        """The workers, and the driver where it is none of them."""
        return self.first_worker + self.num_workers

    @property
    def num_segments(self) -> int:
        return len(self.segment_stage)

    @property
    def replicated_stage(self) -> int:
        """The stage that predicts, and therefore runs on `stride` workers."""
        return self.segment_stage[-1]

    def stage_of_rank(self, rank: int) -> int | None:
        """The first `num_stages` workers run the stage of their number, the others copies of the replicated
        one; None for a driver that computes nothing."""
        worker = rank - self.first_worker
        if worker < 0:
            return None
        return worker if worker < self.num_stages else self.replicated_stage

    def copy_of_rank(self, rank: int) -> int:
        """Which copy of its stage a rank runs; 0 but for the further copies of the replicated stage."""
        return max(0, rank - self.first_worker - self.num_stages + 1)

    def rank_of(self, stage: int, copy: int = 0) -> int:
        """The rank that runs copy `copy` of a stage."""
        return self.first_worker + (stage if copy == 0 else self.num_stages - 1 + copy)

    def round_of(self, step: int) -> Round:
        """The round that predicts `step`; IndexError outside the schedule."""
        if not self.first_step <= step < self.num_steps:
            raise IndexError(f"step {step} is not among {self.first_step} to {self.num_steps - 1}")
        return self.rounds[bisect_right(self._round_starts, step) - 1]

    def is_predicted(self, step: int) -> bool:
        """Whether the prediction for `step` is made: in order, and after warm-up for the last of every
        `refresh_every` steps."""
        since_warmup = step + 1 - self.first_step - self.warmup_steps
        return self.round_of(step).in_order or since_warmup % self.refresh_every == 0

    @cached_property
    def history_depth(self) -> int:
        """How many versions of a state must be kept: over how many rounds back any is read."""
        index = {round_.first_step: place for place, round_ in enumerate(self.rounds)}
        made = {op.value: index[round_.first_step] for round_, _, op in self.computes()}
        depths = (
            index[round_.first_step] - made[term.value]
            for round_, _, op in self.computes()
            for read in op.reads
            for term in read.terms
        )
        return max(depths, default=0) or 1

    @cached_property
    def continues_latents(self) -> bool:
        """Whether anything is evaluated on the latents of a step to come."""
        return any(op.latents_step != op.input_step for _, _, op in self.computes())

    def computes(self) -> Iterator[tuple[Round, int, Compute]]:
        """Every computation with its round and rank, round by round and rank by rank."""
        for round_ in self.rounds:
            for rank, ops in enumerate(round_.ops):
                for op in ops:
                    if isinstance(op, Compute):
                        yield round_, rank, op

    @cached_property
    def _round_starts(self) -> list[int]:
        return [round_.first_step for round_ in self.rounds]
