"""Predicted times against cases worked out by hand and against an independent event-driven simulation."""

from __future__ import annotations

import heapq
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncdiff.errors import ConfigurationError
from asyncdiff.schedule import Compute, Predict, Schedule, Send, SendPrediction, build_schedule
from asyncdiff.simulation import (
    COMPUTE,
    DRIVER,
    TRANSFER,
    WAIT,
    Machine,
    Span,
    Timeline,
    simulate,
    write_traces,
)


def schedule_of(kind: str, num_stages: int, stride: int, warmup_steps: int, num_steps: int) -> Schedule:
    return build_schedule(
        kind=kind, num_stages=num_stages, stride=stride, warmup_steps=warmup_steps, num_steps=num_steps
    )


def free_machine(schedule: Schedule) -> Machine:
    return Machine((1.0,) * schedule.num_ranks)


@pytest.mark.parametrize("seconds", [(2.0, 3.0), (3.0, 2.0), (2.0, 2.0)])
def test_steady_step_takes_the_largest_stage(seconds: tuple[float, float]) -> None:
    """N=2, S=1, free transfers: warm-up costs the sum, further steps the maximum, the last only stage 1."""
    schedule = schedule_of("chain", 2, 1, 2, 8)
    timeline = simulate(schedule, free_machine(schedule), segment_seconds=seconds, transfer_bytes={})
    assert timeline.step_seconds == (sum(seconds),) * 2 + (max(seconds),) * 5 + (seconds[1],)
    assert timeline.total_s == sum(timeline.step_seconds)
    # Stage 0: all steps but the last. It waits for stage 1 in warm-up and at the end, else for the
    # difference.
    assert timeline.compute_s(0) == 7 * seconds[0]
    assert timeline.wait_s(0) == timeline.total_s - timeline.compute_s(0)


def test_a_driver_that_computes_nothing_waits_for_the_prediction_of_the_workers() -> None:
    """N=2, S=1: the largest stage, then the prediction on its way; all of it is waiting to the driver."""
    schedule = build_schedule(
        kind="chain", num_stages=2, stride=1, warmup_steps=2, num_steps=8, driver_computes=False
    )
    timeline = simulate(schedule, Machine((1.0,) * 3, 0.25), segment_seconds=(2.0, 3.0), transfer_bytes={})
    # Told, stage 0, what crosses on its way, stage 1, the prediction on its way; then neither waits for the
    # other.
    assert timeline.step_seconds[0] == 0.25 + 2.0 + 0.25 + 3.0 + 0.25
    assert timeline.step_seconds[4:7] == (0.25 + 3.0 + 0.25,) * 3
    assert timeline.compute_s(0) == 0.0
    assert timeline.wait_s(0) == timeline.total_s
    assert (timeline.compute_s(1), timeline.compute_s(2)) == (7 * 2.0, 8 * 3.0)


def test_stride_runs_the_other_stages_once_per_round() -> None:
    """N=2, S=2 with stages of 2 s and 1 s: 2 s a round of two steps."""
    schedule = schedule_of("chain", 2, 2, 1, 13)
    timeline = simulate(schedule, free_machine(schedule), segment_seconds=(2.0, 1.0), transfer_bytes={})
    assert timeline.step_seconds[0] == 3.0
    assert timeline.step_seconds[3:11:2] == (2.0,) * 4
    assert timeline.step_seconds[4:12:2] == (0.0,) * 4


def test_transfer_takes_latency_and_bytes_over_bandwidth() -> None:
    """An in-order step: C0 (2 s), its state (0.5 + 30/10 s), C1 (1 s), the prediction (0.5 + 5/10 s)."""
    schedule = schedule_of("chain", 2, 1, 1, 1)
    machine = Machine((1.0, 1.0), latency_s=0.5, bandwidth_bytes_per_s=10.0)
    timeline = simulate(
        schedule, machine, segment_seconds=(2.0, 1.0), transfer_bytes={(0, 1): 30.0}, prediction_bytes=5.0
    )
    assert timeline.step_seconds == (2.0 + 3.5 + 1.0 + 1.0,)
    assert [(span.rank, span.category, span.start_s, span.end_s) for span in timeline.spans] == [
        (0, COMPUTE, 0.0, 2.0),
        (1, WAIT, 0.0, 5.5),
        (0, TRANSFER, 2.0, 5.5),
        (0, WAIT, 2.0, 7.5),
        (1, COMPUTE, 5.5, 6.5),
        (1, TRANSFER, 6.5, 7.5),
    ]


def test_transfers_hide_behind_computation() -> None:
    """A state has a whole step to cross: as long as it takes less, the step takes no longer."""
    schedule = schedule_of("chain", 2, 1, 1, 10)
    hidden = Machine((1.0, 1.0), latency_s=0.0, bandwidth_bytes_per_s=1.0)
    seconds = (1.0, 2.0)
    timeline = simulate(schedule, hidden, segment_seconds=seconds, transfer_bytes={(0, 1): 0.9})
    assert timeline.step_seconds[2:] == pytest.approx((2.0,) * 8)
    # Step 0 ends at 1 + 5 + 2 = 8 s, step 1 at 10; its state left at 9 and arrives at 14, so step 2 ends at
    # 16.
    late = simulate(schedule, hidden, segment_seconds=seconds, transfer_bytes={(0, 1): 5.0})
    assert late.step_seconds[:3] == pytest.approx((8.0, 2.0, 6.0))


def test_driver_work_comes_between_steps() -> None:
    schedule = schedule_of("chain", 2, 1, 1, 5)
    timeline = simulate(
        schedule, free_machine(schedule), segment_seconds=(1.0, 1.0), transfer_bytes={}, driver_seconds=0.25
    )
    assert timeline.step_seconds == (2.25, 1.25, 1.25, 1.25, 1.25)
    assert timeline.seconds(0, DRIVER) == 1.25


def test_devices_that_slow_each_other_down_do_so_after_warm_up() -> None:
    """N=2, stages of 2 and 3 s, three quarters of the speed left: 5 s a step in order, then 3 / 0.75."""
    schedule = schedule_of("chain", 2, 1, 2, 6)
    machine = Machine((1.0, 1.0), busy_speed=0.75)
    timeline = simulate(schedule, machine, segment_seconds=(2.0, 3.0), transfer_bytes={})
    assert timeline.step_seconds == pytest.approx((5.0,) * 2 + (4.0,) * 4)


def test_a_stage_that_reads_no_latents_works_while_the_driver_does() -> None:
    """N=2, stages of 2 and 3 s, 1 s of driver work: it is the first stage's, and hidden behind the second."""
    schedule = schedule_of("chain", 2, 1, 1, 10)
    machine = free_machine(schedule)
    run = {"segment_seconds": (2.0, 3.0), "transfer_bytes": {}, "driver_seconds": 1.0}
    ahead = simulate(schedule, machine, **run, latents_stages=(0,))
    assert ahead.step_seconds[2:-1] == pytest.approx((3.0,) * 7)
    assert simulate(schedule, machine, **run).step_seconds[2:-1] == pytest.approx((4.0,) * 7)
    slower = simulate(schedule, machine, **run | {"driver_seconds": 2.0}, latents_stages=(0,))
    assert slower.step_seconds[3:-1] == pytest.approx((4.0,) * 6)  # now the driver's device is the slower one


def test_nested_inner_stage_works_while_the_outer_one_does() -> None:
    """E 1 s, A 2 s, Z 1 s: 4 s in order. A then starts when E of the step is there and ends 1 s after Z: the
    next E hides it, so every step takes 2 s. The last A has no reader."""
    schedule = schedule_of("nested", 2, 1, 1, 6)
    timeline = simulate(schedule, free_machine(schedule), segment_seconds=(1.0, 2.0, 1.0), transfer_bytes={})
    assert timeline.step_seconds == (4.0, 2.0, 2.0, 2.0, 2.0, 2.0)
    assert timeline.compute_s(1) == 2.0 * 5


def test_device_speeds_divide_the_seconds() -> None:
    schedule = schedule_of("chain", 2, 1, 1, 6)
    timeline = simulate(schedule, Machine((2.0, 0.5)), segment_seconds=(4.0, 1.0), transfer_bytes={})
    assert timeline.step_seconds[0] == 4.0
    assert timeline.compute_s(0) == 2.0 * 5
    assert timeline.compute_s(1) == 2.0 * 6


@st.composite
def runs(draw: st.DrawFn) -> dict:
    schedule = build_schedule(
        kind=draw(st.sampled_from(["chain", "nested"])), num_stages=draw(st.integers(1, 4)),
        stride=draw(st.integers(1, 3)), warmup_steps=draw(st.integers(1, 3)), num_steps=draw(st.integers(1,
        10)),
    )  # fmt: skip
    amounts = st.integers(0, 8).map(float)
    speeds = draw(
        st.lists(
            st.sampled_from([0.5, 1.0, 2.0]), min_size=schedule.num_workers, max_size=schedule.num_workers
        )
    )
    segments = range(schedule.num_segments)
    return {
        "schedule": schedule,
        "machine": Machine(
            speeds,
            draw(st.sampled_from([0.0, 0.5])),
            draw(st.sampled_from([math.inf, 2.0])),
            draw(st.sampled_from([1.0, 0.5])),
        ),
        "segment_seconds": [draw(amounts) for _ in segments],
        "transfer_bytes": {(i, j): draw(amounts) for i in segments for j in segments if i < j},
        "prediction_bytes": draw(amounts),
        "driver_seconds": draw(amounts),
        "latents_stages": draw(st.none() | st.sets(st.integers(0, schedule.num_stages - 1))),
    }  # fmt: skip


@given(runs())
def test_total_is_that_of_an_event_driven_simulation(run: dict) -> None:
    timeline = simulate(**run)
    assert timeline.step_seconds == pytest.approx(event_driven(**run))
    assert sum(timeline.step_seconds) <= timeline.total_s + 1e-9


@given(runs())
def test_spans_of_a_rank_follow_one_another(run: dict) -> None:
    """Computing, waiting and the driver's work of a rank cover its time without gaps or overlaps."""
    timeline = simulate(**run)
    for rank in timeline.ranks:
        spans = [s for s in timeline.spans if s.rank == rank and s.category != TRANSFER]
        spans.sort(key=lambda span: (span.start_s, span.end_s))
        end_s = 0.0
        for span in spans:
            assert span.start_s == pytest.approx(end_s)
            end_s = span.end_s
        busy_s = timeline.compute_s(rank) + timeline.wait_s(rank) + timeline.seconds(rank, DRIVER)
        assert busy_s == pytest.approx(end_s)
        assert end_s <= timeline.total_s + 1e-9


def event_driven(
    schedule: Schedule,
    machine: Machine,
    segment_seconds: list[float],
    transfer_bytes: dict,
    prediction_bytes: float,
    driver_seconds: float,
    latents_stages: set[int] | None,
) -> list[float]:
    """Step times from a clock that advances from event to event: messages and ends of work in a heap.

    Shares nothing with `simulate` but the operations. A worker is a position in its flat list of operations;
    it is looked at again whenever anything has happened.
    """
    ranks = range(schedule.num_workers)
    # How many rounds beyond the one that is dispatched a rank is told of.
    ahead = [
        int(latents_stages is not None and schedule.stage_of_rank(rank) not in latents_stages)
        for rank in ranks
    ]
    todo = [[(i, op) for i, r in enumerate(schedule.rounds) for op in r.ops[rank]] for rank in ranks]
    position, busy_until = [0 for _ in ranks], [0.0 for _ in ranks]
    events: list[tuple[float, int, str]] = []
    arrived: set[tuple[int, str]] = set()

    def dispatch(index: int, now: float) -> None:
        for rank in ranks:
            for told in range(index, index + 1 + ahead[rank]):
                when = now + (machine.latency_s if rank else 0.0)
                heapq.heappush(events, (when, rank, repr(("round", told))))

    dispatch(0, 0.0)
    links: dict[tuple[int, int], float] = {}
    ends: list[float] = []

    def post(sender: int, to: int, what: object, num_bytes: float, now: float) -> None:
        start = max(now, links.get((sender, to), 0.0))
        links[sender, to] = start + machine.latency_s + num_bytes / machine.bandwidth_bytes_per_s
        heapq.heappush(events, (links[sender, to], to, repr(what)))

    def step(rank: int, now: float) -> bool:
        if busy_until[rank] > now or position[rank] == len(todo[rank]):
            return False
        index, op = todo[rank][position[rank]]
        if isinstance(op, Compute):
            needs = [repr(term.value) for read in op.reads for term in read.terms] + [repr(("round", index))]
            if any((rank, need) not in arrived for need in needs):
                return False
            shared = 1.0 if schedule.rounds[index].in_order else machine.busy_speed
            busy_until[rank] = now + segment_seconds[op.segment] / machine.device_speeds[rank] / shared
            heapq.heappush(events, (busy_until[rank], rank, "done"))
        elif isinstance(op, Send):
            ranks_stage = schedule.stage_of_rank(op.to_rank)
            readers = [s for s, stage in enumerate(schedule.segment_stage) if stage == ranks_stage]
            readers = [s for s in readers if s > op.value.segment]
            num_bytes = sum(transfer_bytes[op.value.segment, reader] for reader in readers)
            post(rank, op.to_rank, op.value, num_bytes, now)
        elif isinstance(op, SendPrediction):
            post(rank, 0, ("prediction", op.step), prediction_bytes, now)
        elif isinstance(op, Predict):
            if op.from_rank and (0, repr(("prediction", op.step))) not in arrived:
                return False
            busy_until[0] = now + driver_seconds
            ends.append(busy_until[0])
            heapq.heappush(events, (busy_until[0], 0, "done"))
            if op.step == schedule.rounds[index].steps[-1]:
                dispatch(index + 1, busy_until[0])
        position[rank] += 1
        return True

    now = 0.0
    while True:
        while any(step(rank, now) for rank in ranks):
            pass
        if not events:
            break
        now = events[0][0]
        while events and events[0][0] == now:
            _, rank, what = heapq.heappop(events)
            arrived.add((rank, what))
    assert all(position[rank] == len(todo[rank]) for rank in ranks)
    return [end - start for start, end in zip([0.0, *ends], ends, strict=False)]


def test_machines_that_do_not_fit_are_refused() -> None:
    schedule = schedule_of("chain", 2, 2, 1, 5)
    with pytest.raises(ConfigurationError, match="3 ranks, but the machine 2 devices"):
        simulate(schedule, Machine((1.0, 1.0)), segment_seconds=(1.0, 1.0), transfer_bytes={})
    with pytest.raises(ConfigurationError, match="2 segments, but seconds for 3"):
        simulate(schedule, Machine((1.0,) * 3), segment_seconds=(1.0,) * 3, transfer_bytes={})
    with pytest.raises(ConfigurationError, match="must be positive"):
        Machine((1.0, 0.0))
    for busy_speed in (0.0, 1.5):
        with pytest.raises(ConfigurationError, match="above 0 and at most 1"):
            Machine((1.0,), busy_speed=busy_speed)
    with pytest.raises(ConfigurationError, match="positive bandwidth"):
        Machine((1.0,), bandwidth_bytes_per_s=0.0)
    with pytest.raises(
        ConfigurationError, match=r"no machine 'abacus'\. Known are 10gbe, nvlink, pcie3, pcie4"
    ):
        Machine.preset("abacus", 2)


def test_presets_are_ordered_by_speed() -> None:
    seconds = [Machine.preset(name, 2).transfer_s(10e6) for name in ("nvlink", "pcie4", "pcie3", "10gbe")]
    assert seconds == sorted(seconds)


def test_trace_has_every_span_in_microseconds(tmp_path: Path) -> None:
    schedule = schedule_of("chain", 2, 1, 1, 2)
    simulated = simulate(schedule, free_machine(schedule), segment_seconds=(1.0, 2.0), transfer_bytes={})
    recorded = Timeline((Span(0, "C0 step 0", 0.5, 1.5, COMPUTE),), total_s=1.5)
    write_traces(tmp_path / "trace.json", {"simulated": simulated, "recorded": recorded})
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == len(simulated.spans) + 1
    assert spans[-1] == {
        "name": "C0 step 0", "cat": "compute", "ph": "X", "pid": 1, "tid": 0, "ts": 0.5e6, "dur": 1e6,
    }  # fmt: skip
    names = {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert {"simulated", "recorded", "rank 0", "rank 1", "rank 0 sends"} <= names


def test_a_recorded_run_is_written_alone(tmp_path: Path) -> None:
    Timeline((Span(1, "wait", 0.0, 1.0, WAIT),), total_s=1.0).write_trace(tmp_path / "run.json")
    assert '"rank 1"' in (tmp_path / "run.json").read_text()
