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
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache

import pytest

from asyncdiff.errors import ConfigurationError
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
    staleness,
    validate,
)

_TERMS: dict[object, int] = {}


def term(*parts: object) -> int:
    """The number of a term; parts are plain values or numbers of terms wrapped by their place."""
    return _TERMS.setdefault(parts, len(_TERMS))


def ran(
    segment: int, inputs: tuple[int, int], timestep: int, reads: dict[int, int], fresh: dict[int, int]
) -> int:
    """`inputs`: the step whose they are, and the step to which the latents are continued. `reads`: of each
    foreign segment, and of the own ones before; `fresh`: what is read of it in time."""
    return term("C", segment, inputs, timestep, *(tuple(sorted(part.items())) for part in (reads, fresh)))


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
    freshness: str = "auto"
    later: frozenset[int] = frozenset()  # in order after warm-up
    in_time: frozenset[tuple[int, int]] = frozenset()  # (producer, reader) pairs with leaves read fresh
    skips: bool = True  # every stage reads of all before it, not of the last one only
    refresh: int = 1  # after warm-up, of how many steps one is predicted


def model(case: Case) -> list[int]:
    """The term of every prediction, from the formulas."""
    if case.kind == "nested" and case.N > 1:
        eps = nested_model(case)
    else:
        eps = ahead_model(case) if case.forecast == "latents" else chain_model(case)
    return [eps(s) for s in range(case.first, case.T) if is_asked_for(case, s)]


def is_asked_for(case: Case, s: int) -> bool:
    """Section 7: the steps in order, and every k-th after warm-up."""
    number = s - case.first - case.warmup + 1
    return number <= 0 or s in case.later or number % case.refresh == 0


def conditioning(case: Case, q: int) -> int:
    """Section 4: t[q] becomes t[q-1] for every evaluation of a step after warm-up."""
    return q - 1 if case.shift and q >= case.first + case.warmup else q


@cache
def rounds(case: Case) -> tuple[dict[int, int | None], frozenset[int]]:
    """Section 3: rounds start at the end of warm-up and follow one another; a step that is told to run in
    order where one would start is a round of its own. (start -> the start before it, those in order)"""
    before: dict[int, int | None] = {}
    in_order = set()
    last, s = None, case.first
    while s < case.T:
        before[s], last = last, s
        if s < case.first + case.warmup or s in case.later:
            in_order.add(s)
        s += 1 if s in in_order else case.S
    return before, frozenset(in_order)


def round_start(case: Case, s: int) -> int:
    return max(start for start in rounds(case)[0] if start <= s)


def is_in_order(case: Case, s: int) -> bool:
    return s in rounds(case)[1]


def shared_step(case: Case, b: int) -> int:
    """Whose timestep conditions the stages that run once in a round: the last one's, as in the paper, or with
    a forecast that of the step whose latents they read (section 5)."""
    return min(b + case.S, case.T) - 1 if case.forecast == "none" else b


def inputs_for(case: Case, b: int, q: int) -> tuple[int, int]:
    """What an evaluation in the round of b that is conditioned on step q is given of the denoiser's inputs:
    those of b, with the latents continued to q if that is the forecast (section 5)."""
    return b, q if case.forecast == "latents" else b


def label_before(case: Case, label: int) -> int | None:
    """The label of the state that precedes the state labelled `label`."""
    return rounds(case)[0][label]


def last_states(case: Case, state: Callable[[int, int], int], j: int, b: int, s: int) -> int:
    """What a reader conditioned on step s of the round b takes for H_j: sections 1 and 5."""
    a = label_before(case, b)
    assert a is not None
    older = label_before(case, a)
    if case.forecast == "none" or older is None:
        return state(j, a)
    return line(state(j, a), state(j, older), Fraction(s - a, a - older))


def state_in_time(case: Case, state: Callable[[int, int], int], j: int, b: int, s: int) -> int:
    """The same of what arrives in time: H_j of this round, continued from there (section 6)."""
    a = label_before(case, b)
    assert a is not None
    if case.forecast == "none" or s == b:
        return state(j, b)
    return line(state(j, b), state(j, a), Fraction(s - b, b - a))


def chain_model(case: Case) -> Callable[[int], int]:
    N = case.N

    def reads_in_order(k: int, s: int) -> tuple[dict[int, int], dict[int, int]]:
        return {j: H(j, s) for j in range(k)}, {j: H(j, s) for j in range(k) if (j, k) in case.in_time}

    def reads(k: int, b: int, s: int) -> tuple[dict[int, int], dict[int, int]]:
        return (
            {j: last_states(case, H, j, b, s) for j in range(k)},
            {j: state_in_time(case, H, j, b, s) for j in range(k) if (j, k) in case.in_time},
        )

    @cache
    def H(k: int, b: int) -> int:  # noqa: N802
        if is_in_order(case, b):
            return ran(k, (b, b), b, *reads_in_order(k, b))
        q = shared_step(case, b)
        return ran(k, (b, b), conditioning(case, q), *reads(k, b, q))

    def eps(s: int) -> int:
        if is_in_order(case, s):
            return ran(N - 1, (s, s), s, *reads_in_order(N - 1, s))
        b = round_start(case, s)
        return ran(N - 1, (b, b), conditioning(case, s), *reads(N - 1, b, s))

    return eps


def ahead_model(case: Case) -> Callable[[int], int]:
    """Section 5: latents continued. Stage k makes its state for the first step of a round that has not come
    yet: as many rounds ahead as its output is on its way; one at most where stages are skipped and all steps
    are predicted."""
    N = case.N
    before, in_order = rounds(case)

    def target(k: int, b: int) -> int:
        ahead = min(1, N - 1 - k) if case.skips and N > 2 and case.refresh == 1 else N - 1 - k
        return b if b in in_order else b + case.S * ahead

    def sources(k: int) -> range:
        return range(k) if case.skips else range(max(0, k - 1), k)

    def taken(j: int, made_in: list[int], q: int) -> int:
        """Of the states that stage j made in these rounds, the one for q, or the line through the nearest."""
        made = {target(j, b): H(j, b) for b in made_in if target(j, b) < case.T}
        if q in made or len(made) == 1:
            return made.get(q) or next(iter(made.values()))
        later, earlier = sorted(sorted(made, reverse=True), key=lambda label: abs(label - q))[:2]
        later, earlier = max(later, earlier), min(later, earlier)
        return line(made[later], made[earlier], Fraction(q - later, later - earlier))

    def evaluated(k: int, b: int, q: int) -> int:
        past = [start for start in before if start < b]
        late = {j: taken(j, past, q) for j in sources(k)}
        fresh = {j: taken(j, [*past, b], q) for j in range(k) if (j, k) in case.in_time}
        return ran(k, (b, q), conditioning(case, q), late, fresh)

    @cache
    def H(k: int, b: int) -> int:  # noqa: N802
        if b in in_order:
            fresh = {j: H(j, b) for j in range(k) if (j, k) in case.in_time}
            return ran(k, (b, b), b, {j: H(j, b) for j in sources(k)}, fresh)
        return evaluated(k, b, target(k, b))

    def eps(s: int) -> int:
        b = round_start(case, s)
        return H(N - 1, s) if b in in_order else evaluated(N - 1, b, s)

    return eps


def nested_model(case: Case) -> Callable[[int], int]:
    N = case.N
    inner = range(1, N)

    def E(b: int, s: int) -> int:  # noqa: N802
        """The outer stage's first part: the latents of step b, the timestep of step s."""
        inputs = inputs_for(case, b, s)
        return ran(0, inputs, s if is_in_order(case, b) else conditioning(case, s), {}, {})

    def state_of_E(_: int, b: int) -> int:  # noqa: N802
        return E(b, b) if is_in_order(case, b) else E(b, shared_step(case, b))

    def in_time(k: int, read: Callable[[int], int]) -> dict[int, int]:
        return {j: read(j) for j in inner if (j, k) in case.in_time}

    @cache
    def A(k: int, b: int) -> int:  # noqa: N802
        if is_in_order(case, b):
            own = {0: E(b, b), **{j: A(j, b) for j in range(1, k)}}
            return ran(k, (b, b), b, own, in_time(k, lambda j: A(j, b)))
        q = shared_step(case, b)
        late = {j: last_states(case, A, j, b, q) for j in range(1, k)}
        of_E = E(b, q) if case.freshness == "auto" else last_states(case, state_of_E, 0, b, q)
        fresh = in_time(k, lambda j: state_in_time(case, A, j, b, q))
        return ran(k, (b, b), conditioning(case, q), {0: of_E, **late}, fresh)

    def eps(s: int) -> int:
        if is_in_order(case, s):
            own = {0: E(s, s), **{k: A(k, s) for k in inner}}
            return ran(N, (s, s), s, own, in_time(N, lambda j: A(j, s)))
        b = round_start(case, s)
        reads = {k: last_states(case, A, k, b, s) for k in inner}
        fresh = in_time(N, lambda j: state_in_time(case, A, j, b, s))
        return ran(N, inputs_for(case, b, s), conditioning(case, s), {0: E(b, s), **reads}, fresh)

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
        reads = {read.segment: self.read(read) for read in op.reads if not read.fresh}
        fresh = {read.segment: self.read(read) for read in op.reads if read.fresh}
        assert len(reads) + len(fresh) == len(op.reads)
        own = {s: t for s, t in self.forward[op.step].items() if s < op.segment}
        assert not own.keys() & reads.keys()
        inputs = op.input_step, op.latents_step
        result = ran(op.segment, inputs, op.condition_step, {**own, **reads}, fresh)
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
    workers = [Worker(rank, schedule, values, predictions) for rank in range(schedule.num_ranks)]
    waiting = [worker.run() for worker in workers]
    for _ in range(sum(len(ops) for round_ in schedule.rounds for ops in round_.ops) + 1):
        if not waiting:
            break
        waiting = [each for each in waiting if next(each, "done") is None]
    assert not waiting, "deadlock"
    assert not any(values.values())
    assert not any(predictions.values())
    steps = range(schedule.first_step, schedule.num_steps)
    assert [step for step, _ in workers[0].handed_over] == [s for s in steps if schedule.is_predicted(s)]
    return [content for _, content in workers[0].handed_over]


def build(case: Case, *, driver_computes: bool = True) -> Schedule:
    return build_schedule(
        kind=case.kind, num_stages=case.N, stride=case.S, warmup_steps=case.warmup, num_steps=case.T,
        first_step=case.first, time_shift=case.shift, forecast=case.forecast, freshness=case.freshness,
        crossings=None if case.skips else [(k, k + 1) for k in range(case.N - 1)],
        fresh_crossings=case.in_time, in_order_steps=case.later, driver_computes=driver_computes,
        refresh_every=case.refresh,
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


@pytest.mark.parametrize(
    ("kind", "N", "skips"),
    [("chain", n, skips) for n in range(1, 6) for skips in (False, True)]
    + [("nested", n, True) for n in range(2, 5)],
)
def test_latents_continued(kind: str, N: int, skips: bool) -> None:
    _TERMS.clear()
    for S, w, T, shift in itertools.product(range(1, 4), range(1, 5), range(5, 14), (False, True)):
        check(Case(kind, N, S, w, T, shift, "latents", skips=skips))
        case = Case(
            kind, N, S, w, T + 3, shift, "latents", first=3, later=frozenset({w + 3, w + 4}), skips=skips
        )
        check(case)
        validate(build(case))


@pytest.mark.parametrize("N", [2, 3, 4])
def test_latents_continued_and_states_in_time(N: int) -> None:
    _TERMS.clear()
    for in_time, S, w, T in itertools.product(
        pairs_in_time("chain", N), range(1, 4), (1, 2, 4), range(5, 11)
    ):
        case = Case("chain", N, S, w, T, S == 2, "latents", in_time=in_time)
        check(case)
        validate(build(case))


@pytest.mark.parametrize(("N", "skips"), [(n, skips) for n in range(1, 5) for skips in (False, True)])
def test_every_kth_step_predicted(N: int, skips: bool) -> None:
    _TERMS.clear()
    for k, w, T in itertools.product(range(1, 5), range(1, 5), range(5, 14)):
        case = Case("chain", N, 1, w, T, False, "latents", skips=skips, refresh=k)
        later = replace(case, T=T + 3, first=3, later=frozenset({w + 3, w + 4}))
        in_time = next(pairs_in_time("chain", N)) if skips else frozenset()
        for each in (case, later, replace(case, in_time=in_time)):
            check(each)
            validate(build(each))


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("N", [1, 2, 3, 4])
def test_a_prediction_takes_one_evaluation_of_every_stage(N: int, skips: bool) -> None:
    """The wave of section 7: stage j works for step i in the round of i - (N - 1 - j), and all that it reads
    was made for i."""
    k, w, T = 4, 2, 30
    schedule = build(Case("chain", N, 1, w, T, False, "latents", skips=skips, refresh=k))
    found = {
        (op.value, round_.first_step, op.latents_step, op.condition_step)
        for round_, _, op in schedule.computes()
        if round_.first_step >= w + N
    }
    assert found == {
        (Value(j, i), i - (N - 1 - j), i, i)
        for i in range(w + k - 1, T, k) for j in range(N)
        if i - (N - 1 - j) >= w + N
    }  # fmt: skip
    reads = [read for round_, _, op in schedule.computes() if round_.first_step >= w + N for read in op.reads]
    assert all(len(read.terms) == 1 for read in reads)
    assert bool(reads) == (N > 1)


def test_of_a_nested_split_every_step_is_predicted() -> None:
    with pytest.raises(ConfigurationError, match="every step is predicted"):
        build(Case("nested", 2, 1, 1, 9, False, "latents", refresh=2))


def test_no_step_runs_in_order_after_others_worked_ahead_of_it() -> None:
    with pytest.raises(ConfigurationError, match="step 5 cannot run in order after one that did not"):
        build(Case("chain", 2, 1, 1, 9, False, "latents", later=frozenset({1, 5})))


@pytest.mark.parametrize("kind", ["chain", "nested"])
def test_steps_of_a_later_start_are_computed_likewise(kind: str) -> None:
    _TERMS.clear()
    for N, S, w, first in itertools.product(range(1, 4), range(1, 4), (1, 2, 3), (1, 7)):
        check(Case(kind, N, S, w, first + 9, True, "linear", first))


def pairs_in_time(kind: str, N: int) -> Iterator[frozenset[tuple[int, int]]]:
    """Sets of pairs that are read in time: all that there can be, and each alone."""
    segments = range(1, N + 1) if kind == "nested" else range(N)
    pairs = list(itertools.combinations(segments, 2))
    yield frozenset(pairs)
    yield from (frozenset({pair}) for pair in pairs)


@pytest.mark.parametrize(("kind", "N"), [("chain", 2), ("chain", 3), ("chain", 4), ("nested", 3)])
def test_what_arrives_in_time_is_read_of_its_own_round(kind: str, N: int) -> None:
    _TERMS.clear()
    for in_time, S, w, T, forecast in itertools.product(
        pairs_in_time(kind, N), range(1, 4), (1, 2, 4), range(5, 11), ("none", "linear")
    ):
        case = Case(kind, N, S, w, T, S == 2, forecast, in_time=in_time)
        check(case)
        validate(build(case))


@pytest.mark.parametrize(("kind", "N"), [("chain", 1), ("chain", 3), ("nested", 2), ("nested", 3)])
def test_steps_in_order_after_warmup(kind: str, N: int) -> None:
    _TERMS.clear()
    for S, w, later, shift, forecast in itertools.product(
        range(1, 4), (1, 2), ({3}, {4, 5}, {2, 7, 8}, {10}), (False, True), ("none", "linear")
    ):
        case = Case(kind, N, S, w, 11, shift, forecast, later=frozenset(later))
        check(case)
        validate(build(case))


@pytest.mark.parametrize("N", [2, 3])
def test_nested_split_of_the_paper_has_two_delays(N: int) -> None:
    _TERMS.clear()
    for S, w, T, forecast in itertools.product(range(1, 4), (1, 2, 4), range(5, 11), ("none", "linear")):
        case = Case("nested", N, S, w, T, False, forecast, freshness="paper")
        check(case)
        validate(build(case))
        ages = {each.latents for each in staleness(build(case)) if each.step >= w + 3 * S}
        assert max(ages, default=2) >= 2


@pytest.mark.parametrize("kind", ["chain", "nested"])
def test_workers_beside_a_driver_that_computes_nothing_compute_the_same(kind: str) -> None:
    _TERMS.clear()
    for N, S, w, forecast in itertools.product(range(1, 4), range(1, 4), (1, 3), ("none", "linear")):
        case = Case(kind, N, S, w, 10, True, forecast)
        schedule = build(case, driver_computes=False)
        validate(schedule)
        assert interpret(schedule) == model(case), case
        assert not any(isinstance(op, Compute) for each in schedule.rounds for op in each.ops[0])


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
