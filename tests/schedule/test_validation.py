"""What holds of every built schedule, counted independently; and that `validate` sees when it does not."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncdiff.schedule import (
    Compute,
    Op,
    Predict,
    Read,
    Recv,
    Schedule,
    ScheduleError,
    Send,
    SendPrediction,
    Term,
    Value,
    build_schedule,
    from_dict,
    to_dict,
    validate,
)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    kind = draw(st.sampled_from(["chain", "nested"]))
    num_stages, first_step = draw(st.integers(1, 6)), draw(st.integers(0, 5))
    num_segments = num_stages + (kind == "nested" and num_stages > 1)
    stages = [*range(num_stages), 0][:num_segments]
    pairs = [(i, j) for j in range(num_segments) for i in range(j) if stages[i] != stages[j]]
    crossings = draw(st.none() | (st.sets(st.sampled_from(pairs)) if pairs else st.just(set())))
    return build_schedule(
        kind=kind,
        num_stages=num_stages,
        stride=draw(st.integers(1, 4)),
        warmup_steps=draw(st.integers(1, 5)),
        num_steps=first_step + draw(st.integers(1, 14)),
        first_step=first_step,
        time_shift=draw(st.booleans()),
        forecast=draw(st.sampled_from(["linear", "none"])),
        crossings=crossings,
        driver_computes=draw(st.booleans()),
    )


def located(schedule: Schedule, kind: type) -> Iterator[tuple[int, Op]]:
    for round_ in schedule.rounds:
        for rank, ops in enumerate(round_.ops):
            yield from ((rank, op) for op in ops if isinstance(op, kind))


def reads_by_rank(schedule: Schedule) -> set[tuple[int, Value]]:
    return {
        (rank, term.value)
        for rank, op in located(schedule, Compute)
        for read in op.reads
        for term in read.terms
    }


@given(schedules())
def test_built_schedules_are_valid(schedule: Schedule) -> None:
    validate(schedule)


@given(schedules())
def test_every_step_is_predicted_once(schedule: Schedule) -> None:
    steps = list(range(schedule.first_step, schedule.num_steps))
    assert [op.step for _, op in located(schedule, Predict)] == steps
    last = schedule.num_segments - 1
    assert sorted(op.step for _, op in located(schedule, Compute) if op.segment == last) == steps
    senders = {op.step: rank for rank, op in located(schedule, SendPrediction)}
    assert all(senders.get(op.step, 0) == op.from_rank for _, op in located(schedule, Predict))


@given(schedules())
def test_what_is_sent_is_what_is_read_elsewhere(schedule: Schedule) -> None:
    homes = {op.value: rank for rank, op in located(schedule, Compute)}
    needed = Counter((homes[v], rank, v) for rank, v in reads_by_rank(schedule) if homes[v] != rank)
    assert Counter((rank, op.to_rank, op.value) for rank, op in located(schedule, Send)) == needed
    assert Counter((op.from_rank, rank, op.value) for rank, op in located(schedule, Recv)) == needed


@given(schedules())
def test_nothing_is_computed_that_no_prediction_rests_on(schedule: Schedule) -> None:
    read = {value for _, value in reads_by_rank(schedule)}
    for _, op in located(schedule, Compute):
        predicts = schedule.segment_stage[op.segment] == schedule.replicated_stage
        assert predicts or op.value in read


@given(schedules())
def test_values_are_produced_once(schedule: Schedule) -> None:
    values = [op.value for _, op in located(schedule, Compute)]
    assert len(values) == len(set(values))


@given(schedules())
def test_the_dict_form_gives_the_schedule_back(schedule: Schedule) -> None:
    assert from_dict(to_dict(schedule)) == schedule


# --- Mutations ---

CASES = [
    build_schedule(kind=kind, num_stages=n, stride=s, warmup_steps=2, num_steps=8, forecast="linear")
    for kind in ("chain", "nested")
    for n, s in ((1, 2), (2, 1), (2, 2), (3, 2), (4, 3))
]
IDS = [f"{case.kind}-{case.num_stages}-{case.stride}" for case in CASES]


def edited(schedule: Schedule, edit: Callable[[list[Op]], list[Op]], round_index: int, rank: int) -> Schedule:
    round_ = schedule.rounds[round_index]
    ops = tuple(tuple(edit(list(o))) if r == rank else o for r, o in enumerate(round_.ops))
    rounds = list(schedule.rounds)
    rounds[round_index] = dataclasses.replace(round_, ops=ops)
    return dataclasses.replace(schedule, rounds=tuple(rounds))


def places(schedule: Schedule) -> Iterator[tuple[int, int, int, Op]]:
    for index, round_ in enumerate(schedule.rounds):
        for rank, ops in enumerate(round_.ops):
            for position, op in enumerate(ops):
                yield index, rank, position, op


def assert_rejected(schedule: Schedule, what: object) -> None:
    try:
        validate(schedule)
    except ScheduleError:
        return
    pytest.fail(f"accepted although {what}")


@pytest.mark.parametrize("schedule", CASES, ids=IDS)
def test_any_dropped_operation_is_rejected(schedule: Schedule) -> None:
    for index, rank, position, op in places(schedule):
        mutant = edited(schedule, lambda ops, p=position: ops[:p] + ops[p + 1 :], index, rank)
        assert_rejected(mutant, f"rank {rank} lacks {op}")


@pytest.mark.parametrize("schedule", CASES, ids=IDS)
def test_any_doubled_operation_is_rejected(schedule: Schedule) -> None:
    for index, rank, position, op in places(schedule):
        mutant = edited(schedule, lambda ops, p=position: [*ops[:p], ops[p], *ops[p:]], index, rank)
        assert_rejected(mutant, f"rank {rank} does {op} twice")


@pytest.mark.parametrize("schedule", CASES, ids=IDS)
def test_an_operation_before_what_it_needs_is_rejected(schedule: Schedule) -> None:
    """A send or a prediction before its computation, a computation before its receive."""
    for index, rank, position, op in places(schedule):
        following = schedule.rounds[index].ops[rank][position + 1 : position + 2]
        if following and depends(following[0], op):
            swap = lambda ops, p=position: [*ops[:p], ops[p + 1], ops[p], *ops[p + 2 :]]  # noqa: E731
            assert_rejected(edited(schedule, swap, index, rank), f"{following[0]} comes before {op}")


def depends(later: Op, op: Op) -> bool:
    if isinstance(op, Compute):
        sends = isinstance(later, Send) and later.value == op.value
        return sends or (isinstance(later, SendPrediction) and later.step == op.step)
    if isinstance(op, Recv) and isinstance(later, Compute):
        return op.value in [term.value for read in later.reads for term in read.terms]
    return isinstance(op, Predict) and isinstance(later, Predict)


@pytest.mark.parametrize("schedule", CASES, ids=IDS)
def test_any_operation_on_another_rank_is_rejected(schedule: Schedule) -> None:
    for index, rank, position, op in places(schedule):
        removed = edited(schedule, lambda ops, p=position: ops[:p] + ops[p + 1 :], index, rank)
        for other in range(schedule.num_ranks):
            if other != rank:
                moved = edited(removed, lambda ops, op=op: [op, *ops], index, other)
                assert_rejected(moved, f"rank {other} instead of {rank} does {op}")


@pytest.mark.parametrize("schedule", CASES, ids=IDS)
def test_any_receive_in_a_later_round_is_rejected(schedule: Schedule) -> None:
    for index, rank, position, op in places(schedule):
        if isinstance(op, Recv) and index + 1 < len(schedule.rounds):
            removed = edited(schedule, lambda ops, p=position: ops[:p] + ops[p + 1 :], index, rank)
            moved = edited(removed, lambda ops, op=op: [op, *ops], index + 1, rank)
            assert_rejected(moved, f"rank {rank} receives {op} one round late")


@pytest.mark.parametrize("schedule", CASES, ids=IDS)
def test_wrong_reads_are_rejected(schedule: Schedule) -> None:
    for index, rank, position, op in places(schedule):
        for read in getattr(op, "reads", ()):
            for wrong in wrong_reads(read):
                compute = dataclasses.replace(op, reads=tuple(wrong if r is read else r for r in op.reads))
                mutant = edited(
                    schedule, lambda ops, p=position, c=compute: [*ops[:p], c, *ops[p + 1 :]], index, rank
                )
                assert_rejected(mutant, f"{op} reads {wrong}")


def wrong_reads(read: Read) -> list[Read]:
    """Of a step that never is, with weights that do not add up, or of nothing."""
    (segment, _), weight = read.terms[0]
    return [
        Read(read.segment, (Term(Value(segment, 99), weight), *read.terms[1:])),
        Read(read.segment, (Term(read.newest, weight + 0.5), *read.terms[1:])),
        Read(read.segment, ()),
    ]


def test_ranks_that_wait_for_each_other_are_rejected() -> None:
    """In an in-order round of a nested split rank 0 sends E before it waits for the inner stage."""
    schedule = build_schedule(kind="nested", num_stages=2, stride=1, warmup_steps=1, num_steps=3)
    receive = next(op for op in schedule.rounds[0].ops[0] if isinstance(op, Recv))
    mutant = edited(schedule, lambda ops: [receive, *(op for op in ops if op != receive)], 0, 0)
    with pytest.raises(ScheduleError, match=r"rank 0, round of step 0: waits for ever: Recv"):
        validate(mutant)


def test_missing_and_repeated_rounds_are_rejected() -> None:
    schedule = build_schedule(kind="chain", num_stages=2, stride=2, warmup_steps=2, num_steps=8)
    for index in range(len(schedule.rounds)):
        head, tail = schedule.rounds[:index], schedule.rounds[index:]
        for rounds in (head + tail[1:], (*head, tail[0], *tail)):
            assert_rejected(dataclasses.replace(schedule, rounds=rounds), f"round {index} is not there once")


def two_stages() -> Schedule:
    return build_schedule(
        kind="chain", num_stages=2, stride=2, warmup_steps=2, num_steps=8, forecast="linear"
    )


def test_a_computation_without_use_is_rejected() -> None:
    """C0 of the last round, which no later round reads."""
    unused = Compute(0, 6, Value(0, 6), 6, 6, 7)
    mutant = edited(two_stages(), lambda ops: [unused, *ops], -1, 0)
    with pytest.raises(ScheduleError, match="computed but never used"):
        validate(mutant)


def test_a_value_sent_to_a_rank_that_does_not_read_it_is_rejected() -> None:
    """Without a forecast, the copy of stage 1 needs the state of step 1, but not that of step 0."""
    schedule = build_schedule(
        kind="chain", num_stages=2, stride=2, warmup_steps=2, num_steps=8, forecast="none"
    )
    mutant = edited(schedule, lambda ops: [*ops[:-1], Send(Value(0, 0), 2), *ops[-1:]], 0, 0)
    with pytest.raises(ScheduleError, match=r"finds H0\(0\) of the round of step 0 instead"):
        validate(mutant)
    with pytest.raises(ScheduleError, match="received but never read"):
        validate(edited(mutant, lambda ops: [*ops, Recv(Value(0, 0), 0)], 0, 2))


def test_a_value_sent_and_received_twice_is_rejected() -> None:
    send, receive = Send(Value(0, 2), 1), Recv(Value(0, 2), 0)
    twice = lambda op: lambda ops: [each for o in ops for each in ([o, o] if o == op else [o])]  # noqa: E731
    mutant = edited(edited(two_stages(), twice(send), 2, 0), twice(receive), 2, 1)
    with pytest.raises(ScheduleError, match="is sent twice"):
        validate(mutant)


def test_a_prediction_computed_by_two_ranks_is_rejected() -> None:
    """Under another value's name, so that only the step gives it away."""
    schedule = two_stages()
    compute = next(op for op in schedule.rounds[2].ops[1] if isinstance(op, Compute))
    again = dataclasses.replace(compute, value=Value(1, 99))
    with pytest.raises(ScheduleError, match="not each step once"):
        validate(edited(schedule, lambda ops: [again, *ops], 2, 2))
