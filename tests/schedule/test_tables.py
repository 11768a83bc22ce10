"""The tables of docs/method.md, section 9, literally: who computes what of which versions."""

from __future__ import annotations

from asyncdiff.schedule import Compute, Predict, Recv, Schedule, Send, SendPrediction, Value, build_schedule


def chain(num_stages: int, stride: int, warmup_steps: int, num_steps: int, **options: object) -> Schedule:
    return build_schedule(
        kind="chain", num_stages=num_stages, stride=stride, warmup_steps=warmup_steps, num_steps=num_steps,
        **{"forecast": "none", **options},
    )  # fmt: skip


def texts(schedule: Schedule, first_step: int) -> list[str]:
    """`rank: Ck(x, what it reads; t)` of every computation of a round, in the order of the ranks."""
    found = []
    for round_, rank, op in schedule.computes():
        if round_.first_step == first_step:
            reads = "".join(
                f", {term.weight:g} {term.value}" if len(read.terms) > 1 else f", {term.value}"
                for read in op.reads
                for term in read.terms
            )
            latents = f"x{op.input_step}" + f"~{op.latents_step}" * (op.latents_step != op.input_step)
            found.append(f"{rank}: C{op.segment}({latents}{reads}; t{op.condition_step})")
    return found


def predicted(schedule: Schedule, first_step: int) -> list[tuple[int, int]]:
    """(step, rank that computes it) of a round."""
    ops = schedule.round_of(first_step).ops[0]
    return [(op.step, op.from_rank) for op in ops if isinstance(op, Predict)]


def test_two_stages() -> None:
    schedule = chain(2, 1, 1, 6)
    assert texts(schedule, 0) == ["0: C0(x0; t0)", "1: C1(x0, H0(0); t0)"]
    for s in range(1, 5):
        assert texts(schedule, s) == [f"0: C0(x{s}; t{s})", f"1: C1(x{s}, H0({s - 1}); t{s})"]
        assert predicted(schedule, s) == [(s, 1)]
    assert texts(schedule, 5) == ["1: C1(x5, H0(4); t5)"]


def test_three_stages() -> None:
    schedule = chain(3, 1, 1, 7)
    for s in range(1, 5):
        assert texts(schedule, s) == [
            f"0: C0(x{s}; t{s})",
            f"1: C1(x{s}, H0({s - 1}); t{s})",
            f"2: C2(x{s}, H0({s - 1}), H1({s - 1}); t{s})",
        ]
    # C0 of step 5 still feeds C2 of step 6 by a skip, C1 of step 5 too; nothing of step 6 feeds anything.
    assert [text[:5] for text in texts(schedule, 5)] == ["0: C0", "1: C1", "2: C2"]
    assert texts(schedule, 6) == ["2: C2(x6, H0(5), H1(5); t6)"]


def test_what_only_feeds_something_unused_is_dropped_too() -> None:
    """Without the skip from stage 0 to stage 2, C0 of the last step but one has no reader either."""
    schedule = chain(3, 1, 1, 7, crossings=[(0, 1), (1, 2)])
    assert [text[:5] for text in texts(schedule, 4)] == ["0: C0", "1: C1", "2: C2"]
    assert [text[:5] for text in texts(schedule, 5)] == ["1: C1", "2: C2"]
    assert [text[:5] for text in texts(schedule, 6)] == ["2: C2"]


def test_two_stages_stride_two() -> None:
    schedule = chain(2, 2, 1, 10)
    assert schedule.num_workers == 3
    assert texts(schedule, 1) == ["0: C0(x1; t2)", "1: C1(x1, H0(0); t1)", "2: C1(x1, H0(0); t2)"]
    assert predicted(schedule, 1) == [(1, 1), (2, 2)]
    assert texts(schedule, 3) == ["0: C0(x3; t4)", "1: C1(x3, H0(1); t3)", "2: C1(x3, H0(1); t4)"]
    assert predicted(schedule, 3) == [(3, 1), (4, 2)]
    assert texts(schedule, 5) == ["0: C0(x5; t6)", "1: C1(x5, H0(3); t5)", "2: C1(x5, H0(3); t6)"]
    assert texts(schedule, 9) == ["1: C1(x9, H0(7); t9)"]
    assert predicted(schedule, 9) == [(9, 1)]
    assert [round_.steps for round_ in schedule.rounds] == [(0,), (1, 2), (3, 4), (5, 6), (7, 8), (9,)]


def test_three_stages_stride_two() -> None:
    schedule = chain(3, 2, 3, 10)
    assert schedule.num_workers == 4
    assert texts(schedule, 3) == [
        "0: C0(x3; t4)",
        "1: C1(x3, H0(2); t4)",
        "2: C2(x3, H0(2), H1(2); t3)",
        "3: C2(x3, H0(2), H1(2); t4)",
    ]
    assert texts(schedule, 5) == [
        "0: C0(x5; t6)",
        "1: C1(x5, H0(3); t6)",
        "2: C2(x5, H0(3), H1(3); t5)",
        "3: C2(x5, H0(3), H1(3); t6)",
    ]
    assert texts(schedule, 7)[2:] == ["2: C2(x7, H0(5), H1(5); t7)", "3: C2(x7, H0(5), H1(5); t8)"]


def test_rounds_start_at_the_end_of_an_even_warmup() -> None:
    """Aligned to even steps instead, an even warm-up would repeat a prediction."""
    schedule = chain(2, 2, 4, 9)
    assert [round_.steps for round_ in schedule.rounds] == [(0,), (1,), (2,), (3,), (4, 5), (6, 7), (8,)]


def test_one_stage_stride_two_is_two_whole_models() -> None:
    schedule = chain(1, 2, 1, 4)
    assert schedule.num_workers == 2
    assert texts(schedule, 1) == ["0: C0(x1; t1)", "1: C0(x1; t2)"]
    assert predicted(schedule, 1) == [(1, 0), (2, 1)]
    assert texts(schedule, 3) == ["0: C0(x3; t3)"]


def test_time_shift_moves_timesteps_from_warmup_on() -> None:
    """Section 4: T=50, w=2, S=1 gives 50,49,49,48,...,3,2; as steps 0,1,1,2,...,48."""
    schedule = chain(2, 1, 2, 50, time_shift=True)
    conditions = [op.condition_step for _, _, op in schedule.computes() if op.segment == 1]
    assert conditions == [0, 1, *range(1, 49)]


def test_first_forecast_needs_two_states() -> None:
    """w=1: the first asynchronous step has one state to read; w=2: it already continues a line."""
    assert texts(chain(2, 1, 1, 6, forecast="linear"), 1)[1] == "1: C1(x1, H0(0); t1)"
    assert texts(chain(2, 1, 1, 6, forecast="linear"), 2)[1] == "1: C1(x2, 2 H0(1), -1 H0(0); t2)"
    assert texts(chain(2, 1, 2, 6, forecast="linear"), 2)[1] == "1: C1(x2, 2 H0(1), -1 H0(0); t2)"


def test_forecast_reaches_to_the_step_that_conditions_the_reader() -> None:
    """Round b=5, S=2: states 3 and 1; stage 1 is conditioned on t5, the copies of stage 2 on t5 and t6."""
    schedule = chain(3, 2, 1, 9, forecast="linear")
    assert texts(schedule, 5) == [
        "0: C0(x5; t5)",
        "1: C1(x5, 2 H0(3), -1 H0(1); t5)",
        "2: C2(x5, 2 H0(3), -1 H0(1), 2 H1(3), -1 H1(1); t5)",
        "3: C2(x5, 2.5 H0(3), -1.5 H0(1), 2.5 H1(3), -1.5 H1(1); t6)",
    ]


def test_continued_latents_make_states_for_steps_to_come() -> None:
    """Without skips stage k of 3 works 2 - k rounds ahead; the first round has but one state to read."""
    schedule = chain(3, 1, 1, 8, forecast="latents", crossings=[(0, 1), (1, 2)])
    assert texts(schedule, 1) == [
        "0: C0(x1~3; t3)", "1: C1(x1~2, H0(0); t2)", "2: C2(x1, H1(0); t1)",
    ]  # fmt: skip
    assert texts(schedule, 4) == [
        "0: C0(x4~6; t6)", "1: C1(x4~5, H0(5); t5)", "2: C2(x4, H1(4); t4)",
    ]  # fmt: skip
    assert texts(schedule, 7) == ["2: C2(x7, H1(7); t7)"]


def test_with_skips_the_latents_are_continued_over_one_round() -> None:
    """Both stages before the last make their state for the next round, the second through a line."""
    schedule = chain(3, 1, 1, 8, forecast="latents")
    assert texts(schedule, 4) == [
        "0: C0(x4~5; t5)",
        "1: C1(x4~5, 2 H0(4), -1 H0(3); t5)",
        "2: C2(x4, H0(4), H1(4); t4)",
    ]


def test_time_shift_does_not_enter_the_forecast() -> None:
    plain = chain(2, 2, 2, 9, forecast="linear")
    shifted = chain(2, 2, 2, 9, forecast="linear", time_shift=True)
    reads = [[op.reads for _, _, op in schedule.computes()] for schedule in (plain, shifted)]
    assert reads[0] == reads[1]


def nested(num_stages: int, stride: int, warmup_steps: int, num_steps: int) -> Schedule:
    return build_schedule(
        kind="nested", num_stages=num_stages, stride=stride, warmup_steps=warmup_steps, num_steps=num_steps,
        forecast="none",
    )  # fmt: skip


def test_nested_inner_stage_reads_fresh_and_outer_reads_late() -> None:
    """Section 6: A(s) reads E(s), Z of step s reads A(s-1)."""
    schedule = nested(2, 1, 1, 5)
    assert texts(schedule, 2) == ["0: C0(x2; t2)", "0: C2(x2, H1(1); t2)", "1: C1(x2, H0(2); t2)"]
    assert texts(schedule, 4) == ["0: C0(x4; t4)", "0: C2(x4, H1(3); t4)"]


def test_nested_stride_two_reads_the_last_copy_of_the_outer_start() -> None:
    schedule = nested(2, 2, 1, 7)
    assert schedule.num_workers == 3
    ops = schedule.round_of(1).ops
    assert texts(schedule, 1) == [
        "0: C0(x1; t1)", "0: C2(x1, H1(0); t1)",
        "1: C1(x1, H0(1); t2)",
        "2: C0(x1; t2)", "2: C2(x1, H1(0); t2)",
    ]  # fmt: skip
    assert Recv(Value(0, 1), from_rank=2) in ops[1]
    assert predicted(schedule, 1) == [(1, 0), (2, 2)]


def test_operations_of_a_round_are_in_their_stated_order() -> None:
    """Receives before the first use in the round or at its end, sends directly after, predictions last."""
    in_order, first, *_ = chain(2, 2, 1, 7).rounds
    state, later = Value(0, 0), Value(0, 1)
    stage_1 = in_order.ops[1]
    assert [type(op) for op in in_order.ops[0]] == [Compute, Send, Send, Predict]
    assert stage_1[0] == Recv(state, from_rank=0)
    assert isinstance(stage_1[1], Compute)
    assert stage_1[2:] == (SendPrediction(0),)
    assert in_order.ops[2] == (Recv(state, from_rank=0),)
    assert [type(op) for op in first.ops[0]] == [Compute, Send, Send, Predict, Predict]
    for rank, step in ((1, 1), (2, 2)):
        compute, *rest = first.ops[rank]
        assert isinstance(compute, Compute)
        assert rest == [SendPrediction(step), Recv(later, from_rank=0)]


def test_only_states_that_somebody_still_reads_are_sent() -> None:
    """Of three warm-up steps, the copy needs the last two states for a forecast, else only the last."""
    for forecast, expected in (("linear", [1, 2]), ("none", [2])):
        schedule = chain(2, 2, 3, 5, forecast=forecast)
        sent = [
            op.value.step
            for r in schedule.rounds
            for op in r.ops[0]
            if isinstance(op, Send) and op.to_rank == 2
        ]
        assert sent == expected


def test_first_step_offsets_everything() -> None:
    """Warm-up counts from the first step: after a restart, as from the beginning of a run."""
    late, early = chain(3, 2, 2, 20, first_step=7), chain(3, 2, 2, 13)
    assert [round_.steps for round_ in late.rounds] == [
        tuple(step + 7 for step in round_.steps) for round_ in early.rounds
    ]
    assert [round_.in_order for round_ in late.rounds] == [round_.in_order for round_ in early.rounds]
    assert [[len(ops) for ops in r.ops] for r in late.rounds] == [
        [len(ops) for ops in r.ops] for r in early.rounds
    ]
    assert late.round_of(7).in_order
    assert late.round_of(10) is late.round_of(9)
