"""The built schedule computes what docs/method.md says: compared with an independent model, term by term.

The model is that page's formulas (sections 1 to 6) as recursive functions of the step; it knows of no
operations, ranks or transfers. The schedule is executed by a small interpreter with a message queue between
every two ranks. Both build nested terms ("segment k ran on the inputs of step x with the timestep of step t
and read ..."), and the terms of all predictions must be identical. Equal terms are made once, so comparing
deep ones costs nothing.
"""

from __future__ import annotations

import itertools
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

import pytest

from asyncdiff.schedule import (
    Compute,
    Predict,
    Read,
    Recv,
    Schedule,
    Send,
    SendPrediction,
    Value,
    build_schedule,
    validate,
)

_TERMS: dict[object, int] = {}


def term(*parts: object) -> int:
    """The number of a term; parts are plain values or numbers of terms wrapped by their place."""
    return _TERMS.setdefault(parts, len(_TERMS))


def ran(segment: int, inputs: int, timestep: int, reads: dict[int, int]) -> int:
    return term("C", segment, inputs, timestep, tuple(sorted(reads.items())))


def line(newest: int, older: int, r: Fraction) -> int:
    return term("line", newest, older, r)


# --- The model: N stages, S stride, w the first asynchronous step, first the first step of the run ---


@dataclass(frozen=True)
class Case:
    kind: str
    N: int
    S: int
    warmup: int
    T: int
    shift: bool
    forecast: str
    first: int = 0


def model(case: Case) -> list[int]:
    """The term of every prediction, from the formulas."""
    eps = nested_model(case) if case.kind == "nested" and case.N > 1 else chain_model(case)
    return [eps(s) for s in range(case.first, case.T)]


def conditioning(case: Case, q: int) -> int:
    """Section 4: t[q] becomes t[q-1] for every evaluation of a step after warm-up."""
    return q - 1 if case.shift and q >= case.first + case.warmup else q


def round_start(case: Case, s: int) -> int:
    """Section 3: rounds start at the end of warm-up and follow one another."""
    w = case.first + case.warmup
    return w + (s - w) // case.S * case.S


def label_before(case: Case, label: int) -> int | None:
    """The label of the state that precedes the state labelled `label`."""
    w = case.first + case.warmup
    before = label - 1 if label <= w else label - case.S
    return before if before >= case.first else None


def last_states(case: Case, state: Callable[[int, int], int], j: int, b: int, s: int) -> int:
    """What a reader conditioned on step s of the round b takes for H_j: sections 1 and 5."""
    a = label_before(case, b)
    assert a is not None
    older = label_before(case, a)
    if case.forecast == "none" or older is None:
        return state(j, a)
    return line(state(j, a), state(j, older), Fraction(s - a, a - older))


def chain_model(case: Case) -> Callable[[int], int]:
    N, S, w = case.N, case.S, case.first + case.warmup

    @cache
    def H(k: int, b: int) -> int:  # noqa: N802
        if b < w:
            return ran(k, b, b, {j: H(j, b) for j in range(k)})
        q = b + S - 1
        return ran(k, b, conditioning(case, q), {j: last_states(case, H, j, b, q) for j in range(k)})

    def eps(s: int) -> int:
        if s < w:
            return ran(N - 1, s, s, {j: H(j, s) for j in range(N - 1)})
        b = round_start(case, s)
        reads = {j: last_states(case, H, j, b, s) for j in range(N - 1)}
        return ran(N - 1, b, conditioning(case, s), reads)

    return eps


def nested_model(case: Case) -> Callable[[int], int]:
    N, S, w = case.N, case.S, case.first + case.warmup
    inner = range(1, N)

    def E(b: int, s: int) -> int:  # noqa: N802
        """The outer stage's first part: the latents of step b, the timestep of step s."""
        return ran(0, b, conditioning(case, s), {})

    @cache
    def A(k: int, b: int) -> int:  # noqa: N802
        if b < w:
            return ran(k, b, b, {0: E(b, b), **{j: A(j, b) for j in range(1, k)}})
        q = b + S - 1
        stale = {j: last_states(case, A, j, b, q) for j in range(1, k)}
        return ran(k, b, conditioning(case, q), {0: E(b, q), **stale})

    def eps(s: int) -> int:
        if s < w:
            return ran(N, s, s, {0: E(s, s), **{k: A(k, s) for k in inner}})
        b = round_start(case, s)
        reads = {k: last_states(case, A, k, b, s) for k in inner}
        return ran(N, b, conditioning(case, s), {0: E(b, s), **reads})

    return eps


# --- The interpreter of a schedule's operations ---


class Worker:
    """One rank: what it holds, and its operations one after the other, waiting where the queue is empty."""

    def __init__(self, rank: int, schedule: Schedule, values: dict, predictions: dict) -> None:
        self.rank = rank
        self.schedule = schedule
        self.values = values
        self.predictions = predictions
        self.held: dict[Value, int] = {}
        self.made: dict[Value, int] = {}
        self.forward: dict[int, dict[int, int]] = defaultdict(dict)  # step -> own segment -> term
        self.handed_over: list[tuple[int, int]] = []

    def run(self) -> Iterator[None]:
        """Yields whenever it waits."""
        for round_ in self.schedule.rounds:
            for op in round_.ops[self.rank]:
                yield from self.execute(op)

    def execute(self, op: object) -> Iterator[None]:
        if isinstance(op, Compute):
            self.compute(op)
        elif isinstance(op, Send):
            self.values[self.rank, op.to_rank].append((op.value, self.made[op.value]))
        elif isinstance(op, SendPrediction):
            self.predictions[self.rank].append((op.step, self.prediction(op.step)))
        elif isinstance(op, Recv):
            yield from self.wait_for(self.values[op.from_rank, self.rank])
            value, content = self.values[op.from_rank, self.rank].popleft()
            assert value == op.value
            self.held[value] = content
        elif isinstance(op, Predict) and op.from_rank == 0:
            self.handed_over.append((op.step, self.prediction(op.step)))
        elif isinstance(op, Predict):
            yield from self.wait_for(self.predictions[op.from_rank])
            self.handed_over.append(self.predictions[op.from_rank].popleft())

    def wait_for(self, queue: deque) -> Iterator[None]:
        while not queue:
            yield

    def prediction(self, step: int) -> int:
        return self.forward[step][self.schedule.num_segments - 1]

    def compute(self, op: Compute) -> None:
        reads = {read.segment: self.read(read) for read in op.reads}
        own = {s: t for s, t in self.forward[op.step].items() if s < op.segment}
        assert not own.keys() & reads.keys()
        result = ran(op.segment, op.input_step, op.condition_step, {**own, **reads})
        self.forward[op.step][op.segment] = self.made[op.value] = result

    def read(self, read: Read) -> int:
        if len(read.terms) == 1:
            assert read.terms[0].weight == 1.0
            return self.held[read.terms[0].value]
        newest, older = read.terms
        assert newest.weight + older.weight == pytest.approx(1.0)
        r = Fraction(-older.weight).limit_denominator(100)
        return line(self.held[newest.value], self.held[older.value], r)


def interpret(schedule: Schedule) -> list[int]:
    """The term of every prediction handed over, in order; AssertionError on a deadlock."""
    values: dict[tuple[int, int], deque] = defaultdict(deque)
    predictions: dict[int, deque] = defaultdict(deque)
    workers = [Worker(rank, schedule, values, predictions) for rank in range(schedule.num_workers)]
    waiting = [worker.run() for worker in workers]
    for _ in range(sum(len(ops) for round_ in schedule.rounds for ops in round_.ops) + 1):
        if not waiting:
            break
        waiting = [each for each in waiting if next(each, "done") is None]
    assert not waiting, "deadlock"
    assert not any(values.values())
    assert not any(predictions.values())
    assert [step for step, _ in workers[0].handed_over] == list(
        range(schedule.first_step, schedule.num_steps)
    )
    return [content for _, content in workers[0].handed_over]


def build(case: Case) -> Schedule:
    return build_schedule(
        kind=case.kind, num_stages=case.N, stride=case.S, warmup_steps=case.warmup, num_steps=case.T,
        first_step=case.first, time_shift=case.shift, forecast=case.forecast,
    )  # fmt: skip


def check(case: Case) -> None:
    schedule = build(case)
    assert interpret(schedule) == model(case), case


@pytest.mark.parametrize(
    ("kind", "N"), [("chain", n) for n in range(1, 5)] + [("nested", n) for n in range(1, 5)]
)
def test_schedule_computes_what_the_formulas_say(kind: str, N: int) -> None:
    _TERMS.clear()
    for S, w, T, shift, forecast in itertools.product(
        range(1, 4), range(1, 8), range(5, 14), (False, True), ("none", "linear")
    ):
        check(Case(kind, N, S, w, T, shift, forecast))


@pytest.mark.parametrize("kind", ["chain", "nested"])
def test_steps_of_a_later_start_are_computed_likewise(kind: str) -> None:
    _TERMS.clear()
    for N, S, w, first in itertools.product(range(1, 4), range(1, 4), (1, 2, 3), (1, 7)):
        check(Case(kind, N, S, w, first + 9, True, "linear", first))


@pytest.mark.parametrize("kind", ["chain", "nested"])
def test_every_built_schedule_is_valid(kind: str) -> None:
    for N, S, w, T, forecast in itertools.product(
        range(1, 5), range(1, 4), (1, 2, 3, 7), range(5, 13), ("none", "linear")
    ):
        validate(build(Case(kind, N, S, w, T, False, forecast)))


@pytest.mark.parametrize("kind", ["chain", "nested"])
def test_warmup_of_all_steps_is_the_unaccelerated_run(kind: str) -> None:
    """Every step then is the stages in order on its own inputs, whatever the stride."""
    _TERMS.clear()
    expected = model(Case(kind, 3, 1, 6, 6, False, "none"))
    assert model(Case(kind, 3, 2, 9, 6, True, "linear")) == expected
    assert interpret(build(Case(kind, 3, 2, 9, 6, True, "linear"))) == expected
