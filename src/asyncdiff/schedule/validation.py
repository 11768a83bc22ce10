"""What must hold of every schedule, whoever made it: checked by running it with names in place of tensors."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from asyncdiff.errors import AsyncDiffError
from asyncdiff.schedule.ops import Compute, Op, Predict, Recv, Send, SendPrediction, Value
from asyncdiff.schedule.rounds import Schedule


class ScheduleError(AsyncDiffError, AssertionError):
    """A schedule that cannot run or does needless work: a defect of whoever made it, not of the user."""


def validate(schedule: Schedule) -> None:
    """Raise `ScheduleError`, naming rank, round and operation, unless all of this holds.

    Every step that is asked for is predicted once, in order, by a worker that computed it; every value is
    produced once, on a rank of its stage; whatever is read is there, and its weights add up to 1; every
    message is received in the round in which it is sent and in the order of its pair of ranks; with blocking
    receives (and sends that do not wait) nothing deadlocks; nothing is computed, sent or received that nobody
    uses.
    """
    _check_steps(schedule)
    _check_homes(schedule)
    _check_uses(schedule)
    _check_forwards(schedule)
    _Run(schedule).finish()


def _fail(op: object, rank: int, round_step: int, why: str) -> ScheduleError:
    return ScheduleError(f"rank {rank}, round of step {round_step}: {why}: {op}")


def _check_steps(schedule: Schedule) -> None:
    """Rounds cover the steps in order, and rank 0 hands each over in its round, after everything else."""
    expected = schedule.first_step
    for round_ in schedule.rounds:
        if len(round_.ops) != schedule.num_ranks:
            raise ScheduleError(
                f"round of step {round_.first_step} has operations for {len(round_.ops)} ranks, "
                f"not {schedule.num_ranks}"
            )
        predicts = [op for op in round_.ops[0] if isinstance(op, Predict)]
        if not round_.steps or round_.first_step != round_.steps[0] or round_.steps[0] != expected:
            raise ScheduleError(f"the round after step {expected - 1} has the steps {round_.steps}")
        asked = [step for step in round_.steps if schedule.is_predicted(step)]
        last = list(round_.ops[0])[len(round_.ops[0]) - len(predicts) :]
        if [op.step for op in predicts] != asked or last != predicts:
            raise ScheduleError(f"rank 0 must end round {round_.steps} by predicting {asked}: {predicts}")
        expected += len(round_.steps)
        if round_.steps[-1] != expected - 1:
            raise ScheduleError(f"the steps of round {round_.steps} do not follow one another")
    if expected != schedule.num_steps:
        raise ScheduleError(f"the schedule ends before step {expected}, not before step {schedule.num_steps}")


def _check_homes(schedule: Schedule) -> None:
    """Every value is produced once, by a rank that runs its segment's stage; only rank 0 predicts."""
    producers: dict[Value, int] = {}
    for round_step, rank, op in _all_ops(schedule):
        if isinstance(op, Predict) and rank != 0:
            raise _fail(op, rank, round_step, "only rank 0 hands predictions over")
        if not isinstance(op, Compute):
            continue
        if op.value.segment != op.segment:
            raise _fail(op, rank, round_step, f"produces {op.value}, the name of another segment's value")
        if schedule.segment_stage[op.segment] != schedule.stage_of_rank(rank):
            raise _fail(op, rank, round_step, f"segment {op.segment} is not of this rank's stage")
        if op.value in producers:
            raise _fail(op, rank, round_step, f"{op.value} was made before, on rank {producers[op.value]}")
        producers[op.value] = rank


def _check_uses(schedule: Schedule) -> None:
    """What is computed is read, sent or predicted; what is received is read there."""
    read_at: dict[Value, set[int]] = defaultdict(set)
    for _, rank, compute in schedule.computes():
        for read in compute.reads:
            for term in read.terms:
                read_at[term.value].add(rank)
    forwards = {(rank, each.step) for _, rank, each in schedule.computes() if _predicts(schedule, each)}
    for round_step, rank, op in _all_ops(schedule):
        if isinstance(op, Recv) and rank not in read_at[op.value]:
            raise _fail(op, rank, round_step, "is received but never read")
        # E of a nested split is used by the Z of the same forward, without being one of its reads.
        if isinstance(op, Compute) and not read_at[op.value] and (rank, op.step) not in forwards:
            raise _fail(op, rank, round_step, "is computed but never used")


def _check_forwards(schedule: Schedule) -> None:
    """Who predicts a step runs all segments of the stage for it, in execution order, on the same inputs."""
    segments = [i for i, stage in enumerate(schedule.segment_stage) if stage == schedule.replicated_stage]
    forwards: dict[tuple[int, int], list[Compute]] = defaultdict(list)
    for round_, rank, op in schedule.computes():
        if schedule.segment_stage[op.segment] == schedule.replicated_stage:
            forwards[rank, op.step].append(op)
            if op.step not in round_.steps:
                raise _fail(op, rank, round_.first_step, "belongs to another round")
    for (rank, _), ops in forwards.items():
        inputs = {(op.input_step, op.latents_step, op.condition_step) for op in ops}
        if [op.segment for op in ops] != segments or len(inputs) != 1:
            raise _fail(
                ops[0], rank, ops[0].step, f"is not a forward of the segments {segments} on one input"
            )


def _predicts(schedule: Schedule, op: Compute) -> bool:
    return op.segment == schedule.num_segments - 1


def _all_ops(schedule: Schedule) -> Iterator[tuple[int, int, Op]]:
    for round_ in schedule.rounds:
        for rank, ops in enumerate(round_.ops):
            for op in ops:
                yield round_.first_step, rank, op


@dataclass
class _Rank:
    """One worker of the run: what it still has to do, what it holds, what it has computed."""

    todo: deque[tuple[int, Op]]
    held: set[Value] = field(default_factory=set)
    made: set[Value] = field(default_factory=set)
    sent: set[tuple[Value, int]] = field(default_factory=set)
    predicted: Counter[int] = field(default_factory=Counter)


class _Run:
    """Executes a schedule with first-in-first-out queues between ranks and receives that block."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.ranks = [
            _Rank(deque((r.first_step, op) for r in schedule.rounds for op in r.ops[rank]))
            for rank in range(schedule.num_ranks)
        ]
        self.values: dict[tuple[int, int], deque[tuple[int, Value]]] = defaultdict(deque)
        self.predictions: dict[int, deque[int]] = defaultdict(deque)

    def finish(self) -> None:
        while any(rank.todo for rank in self.ranks):
            progress = [self._advance(rank) for rank in range(len(self.ranks))]
            if not any(progress):
                self._raise_deadlock()
        for (sender, receiver), queue in self.values.items():
            for round_step, value in queue:
                raise _fail(Send(value, receiver), sender, round_step, "is sent but never received")
        for rank, steps in self.predictions.items():
            for step in steps:
                raise _fail(SendPrediction(step), rank, step, "is sent but never handed over")
        self._check_all_predicted()

    def _raise_deadlock(self) -> None:
        rank = next(i for i, state in enumerate(self.ranks) if state.todo)
        round_step, op = self.ranks[rank].todo[0]
        raise _fail(op, rank, round_step, "waits for ever")

    def _advance(self, rank: int) -> bool:
        """Run a rank until it waits; whether it got anywhere."""
        todo = self.ranks[rank].todo
        before = len(todo)
        while todo and self._run(rank, *todo[0]):
            todo.popleft()
        return len(todo) < before

    def _run(self, rank: int, round_step: int, op: Op) -> bool:
        """Execute one operation; False if it has to wait."""
        if isinstance(op, Compute):
            return self._compute(rank, round_step, op)
        if isinstance(op, Send):
            return self._send(rank, round_step, op)
        if isinstance(op, Recv):
            return self._recv(rank, round_step, op)
        if isinstance(op, SendPrediction):
            return self._send_prediction(rank, round_step, op)
        return self._predict(round_step, op)

    def _compute(self, rank: int, round_step: int, op: Compute) -> bool:
        state = self.ranks[rank]
        for read in op.reads:
            missing = [term.value for term in read.terms if term.value not in state.held]
            if missing:
                raise _fail(op, rank, round_step, f"reads {missing[0]}, which is not there")
            if any(term.value.segment != read.segment for term in read.terms):
                raise _fail(op, rank, round_step, "reads versions of another segment")
            if not read.terms or abs(sum(term.weight for term in read.terms) - 1.0) > 1e-9:
                raise _fail(op, rank, round_step, "has a read whose weights do not add up to 1")
        state.made.add(op.value)
        if _predicts(self.schedule, op):
            state.predicted[op.step] += 1
        return True

    def _send(self, rank: int, round_step: int, op: Send) -> bool:
        state = self.ranks[rank]
        if op.value not in state.made:
            raise _fail(op, rank, round_step, "is sent before it is computed there")
        if op.to_rank == rank or not 0 <= op.to_rank < len(self.ranks):
            raise _fail(op, rank, round_step, f"there is no other rank {op.to_rank}")
        if (op.value, op.to_rank) in state.sent:
            raise _fail(op, rank, round_step, "is sent twice")
        state.sent.add((op.value, op.to_rank))
        self.values[rank, op.to_rank].append((round_step, op.value))
        return True

    def _recv(self, rank: int, round_step: int, op: Recv) -> bool:
        queue = self.values[op.from_rank, rank]
        if not queue:
            return False
        if queue[0] != (round_step, op.value):
            sent_round, value = queue[0]
            raise _fail(op, rank, round_step, f"finds {value} of the round of step {sent_round} instead")
        queue.popleft()
        self.ranks[rank].held.add(op.value)
        return True

    def _send_prediction(self, rank: int, round_step: int, op: SendPrediction) -> bool:
        if rank == 0 or not self.ranks[rank].predicted[op.step]:
            raise _fail(op, rank, round_step, "sends a prediction it has not computed, or to itself")
        self.predictions[rank].append(op.step)
        return True

    def _predict(self, round_step: int, op: Predict) -> bool:
        if op.from_rank == 0:
            if not self.ranks[0].predicted[op.step]:
                raise _fail(op, 0, round_step, "is not computed on rank 0")
            return True
        queue = self.predictions[op.from_rank]
        if not queue:
            return False
        if queue[0] != op.step:
            raise _fail(op, 0, round_step, f"finds the prediction for step {queue[0]} instead")
        queue.popleft()
        return True

    def _check_all_predicted(self) -> None:
        computed = sum((rank.predicted for rank in self.ranks), Counter[int]())
        steps = range(self.schedule.first_step, self.schedule.num_steps)
        expected = Counter(filter(self.schedule.is_predicted, steps))
        if computed != expected:
            raise ScheduleError(
                f"computed predictions {sorted(computed.elements())}, not each step once that is asked for"
            )
