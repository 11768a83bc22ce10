"""How long a schedule takes: the third interpreter of its operations, with seconds in place of tensors."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence

from asyncdiff.errors import ConfigurationError
from asyncdiff.schedule.ops import Compute, Op, Predict, Read, Recv, Send, SendPrediction, Value
from asyncdiff.schedule.rounds import Schedule
from asyncdiff.simulation.machine import Machine
from asyncdiff.simulation.timeline import COMPUTE, DRIVER, TRANSFER, WAIT, Span, Timeline


def simulate(
    schedule: Schedule,
    machine: Machine,
    *,
    segment_seconds: Sequence[float],
    transfer_bytes: Mapping[tuple[int, int], float],
    prediction_bytes: float = 0.0,
    driver_seconds: float = 0.0,
    latents_stages: Collection[int] | None = None,
    fresh_leads: Mapping[tuple[int, int], float] | None = None,
    second: Schedule | None = None,
) -> Timeline:
    """The timeline of one run of a valid schedule on a machine.

    `segment_seconds`: one per segment, on a device of speed 1. `transfer_bytes`: (producing segment, reading
    segment) -> bytes, as `crossing_bytes` gives them; pairs that are missing send nothing but a message of no
    bytes. `driver_seconds`: the pipeline's own work after each prediction. `latents_stages`: the stages that
    read what the driver makes of a prediction, None for all. `fresh_leads`: (producing segment, reading
    segment) -> how many seconds after the producer's start, on a device of speed 1, the reader can start so
    that the leaves it reads fresh are there when it comes to them (`fresh_reads`); pairs that are missing
    wait for the whole segment. `second`: of the same ranks and rounds, each of which comes after the one of
    `schedule` (the half of guidance that is left out at times); a prediction is waited for when both have
    been started.

    A worker starts a round when the driver dispatches it, one latency after the driver has finished the step
    before (the latents' own bytes are left out); one whose stage reads no latents is told of a round when the
    one before is dispatched. Computations run in the order of the schedule, each as soon
    as what it reads has arrived; transfers begin when the value is complete, overlap with everything but
    other transfers from the same rank to the same rank, and receives only hold up the computation that needs
    them. Raises `ConfigurationError` where the machine's devices or the seconds do not match the schedule.
    """
    if len(machine.device_speeds) != schedule.num_ranks:
        raise ConfigurationError(
            f"The schedule has {schedule.num_ranks} ranks, but the machine {len(machine.device_speeds)} "
            "devices."
        )
    if len(segment_seconds) != schedule.num_segments:
        raise ConfigurationError(
            f"The schedule has {schedule.num_segments} segments, but seconds for {len(segment_seconds)}."
        )
    if second is not None and (second.num_ranks, len(second.rounds)) != (
        schedule.num_ranks,
        len(schedule.rounds),
    ):
        raise ConfigurationError("The second schedule has other ranks or rounds than the first.")
    waiting = [
        latents_stages is None or schedule.stage_of_rank(rank) in latents_stages
        for rank in range(schedule.num_ranks)
    ]
    run = _Run(
        schedule,
        machine,
        tuple(segment_seconds),
        transfer_bytes,
        prediction_bytes,
        driver_seconds,
        waiting,
        fresh_leads or {},
    )
    return run.finish([schedule] if second is None else [schedule, second])


class _Run:
    """The clocks of workers and links while a schedule is played through."""

    def __init__(
        self,
        schedule: Schedule,
        machine: Machine,
        segment_seconds: tuple[float, ...],
        transfer_bytes: Mapping[tuple[int, int], float],
        prediction_bytes: float,
        driver_seconds: float,
        waits_for_driver: Sequence[bool],
        fresh_leads: Mapping[tuple[int, int], float],
    ) -> None:
        self.schedule = schedule
        self.machine = machine
        self.segment_seconds = segment_seconds
        self.transfer_bytes = transfer_bytes
        self.prediction_bytes = prediction_bytes
        self.driver_seconds = driver_seconds
        self.waits_for_driver = waits_for_driver
        self.fresh_leads = fresh_leads
        self.channel = 0  # which of the schedules is being played
        self.started: dict[tuple[int, Value], tuple[float, float]] = {}  # when, and at which speed
        self.is_in_order = True
        self.clock = [0.0] * schedule.num_ranks
        self.dispatched_s = self.dispatched_before_s = 0.0
        self.speed_in_round = 1.0
        self.link_free_s: dict[tuple[int, int], float] = {}
        self.available_s: dict[tuple[int, Value, int], float] = {}  # when a rank has a value
        self.prediction_s: dict[tuple[int, int], float] = {}  # when the driver has the prediction for a step
        self.spans: list[Span] = []
        self.step_seconds: list[float] = []
        self.step_ended_s = 0.0

    def finish(self, schedules: Sequence[Schedule]) -> Timeline:
        self.readers = [_reading_segments(schedule) for schedule in schedules]
        for rounds in zip(*(schedule.rounds for schedule in schedules), strict=True):
            for self.channel, round_ in enumerate(rounds):
                self.is_in_order = round_.in_order
                self.speed_in_round = 1.0 if round_.in_order else self.machine.busy_speed
                self._play_round([deque(_without_predictions(ops)) for ops in round_.ops])
            for step in rounds[0].steps:
                self._predict(step)
            self.dispatched_before_s, self.dispatched_s = self.dispatched_s, self.clock[0]
        spans = tuple(sorted(self.spans, key=lambda span: (span.start_s, span.rank)))
        return Timeline(spans, max(self.clock), tuple(self.step_seconds))

    def _play_round(self, todo: list[deque[Op]]) -> None:
        """Every worker as far as it gets, until all are done: nothing waits for a later round."""
        while any(todo):
            for rank, ops in enumerate(todo):
                while ops and self._play(rank, ops[0]):
                    ops.popleft()

    def _play(self, rank: int, op: Op) -> bool:
        """Execute one operation; False while it is not known when its inputs arrive."""
        if isinstance(op, Compute):
            return self._compute(rank, op)
        if isinstance(op, Send):
            reads = self.readers[self.channel].get((op.value.segment, op.to_rank), ())
            num_bytes = sum(self.transfer_bytes.get((op.value.segment, reader), 0.0) for reader in reads)
            self.available_s[self.channel, op.value, op.to_rank] = self._transfer(
                rank, op.to_rank, num_bytes, str(op.value)
            )
        if isinstance(op, SendPrediction):
            name = f"prediction {op.step}"
            self.prediction_s[self.channel, op.step] = self._transfer(rank, 0, self.prediction_bytes, name)
        assert isinstance(op, Send | SendPrediction | Recv)
        return True

    def _compute(self, rank: int, op: Compute) -> bool:
        arrivals = [
            self._arrival(rank, op.segment, read, term.value) for read in op.reads for term in read.terms
        ]
        known = [arrived_s for arrived_s in arrivals if arrived_s is not None]
        if len(known) < len(arrivals):
            return False
        is_told_now = self.waits_for_driver[rank] or self.channel > 0
        dispatched_s = self.dispatched_s if is_told_now else self.dispatched_before_s
        dispatched_s += self.machine.latency_s if rank else 0.0
        start_s = self._wait_until(rank, max(dispatched_s, *known, 0.0), str(op.value))
        speed = self.machine.device_speeds[rank] * self.speed_in_round
        self.started[self.channel, op.value] = (start_s, speed)
        seconds = self.segment_seconds[op.segment] / speed
        self._occupy(rank, f"C{op.segment} step {op.step}", start_s + seconds, COMPUTE)
        if op.segment == self.schedule.num_segments - 1 and rank == 0:
            self.prediction_s[self.channel, op.step] = self.clock[0]
        return True

    def _arrival(self, rank: int, reader: int, read: Read, value: Value) -> float | None:
        """From when on a value does not hold up a computation that starts; None while that is not known.

        Of what is read fresh only some leaves count, which are sent before the segment ends and needed after
        the reader has begun.
        """
        lead_s = self.fresh_leads.get((read.segment, reader))
        if not read.fresh or value != read.newest or lead_s is None or self.is_in_order:
            return self.available_s.get((self.channel, value, rank))
        if (self.channel, value) not in self.started:
            return None
        start_s, speed = self.started[self.channel, value]
        return start_s + lead_s / speed + self.machine.latency_s

    def _predict(self, step: int) -> None:
        for channel in range(len(self.readers)):
            if (channel, step) in self.prediction_s:
                self._wait_until(0, self.prediction_s[channel, step], f"prediction {step}")
        self._occupy(0, f"driver step {step}", self.clock[0] + self.driver_seconds, DRIVER)
        self.step_seconds.append(self.clock[0] - self.step_ended_s)
        self.step_ended_s = self.clock[0]

    def _transfer(self, rank: int, to_rank: int, num_bytes: float, name: str) -> float:
        """When a message sent now has arrived."""
        start_s = max(self.clock[rank], self.link_free_s.get((rank, to_rank), 0.0))
        end_s = start_s + self.machine.transfer_s(num_bytes)
        self.link_free_s[rank, to_rank] = end_s
        self.spans.append(Span(rank, f"{name} to {to_rank}", start_s, end_s, TRANSFER))
        return end_s

    def _wait_until(self, rank: int, ready_s: float, name: str) -> float:
        if ready_s > self.clock[rank]:
            self._occupy(rank, f"wait for {name}", ready_s, WAIT)
        return self.clock[rank]

    def _occupy(self, rank: int, name: str, end_s: float, category: str) -> None:
        if end_s > self.clock[rank] or category == COMPUTE:
            self.spans.append(Span(rank, name, self.clock[rank], end_s, category))
        self.clock[rank] = end_s


def _without_predictions(ops: Sequence[Op]) -> Iterator[Op]:
    return (op for op in ops if not isinstance(op, Predict))


def _reading_segments(schedule: Schedule) -> dict[tuple[int, int], tuple[int, ...]]:
    """(producing segment, rank) -> the segments that read it there."""
    found: dict[tuple[int, int], set[int]] = {}
    for _, rank, op in schedule.computes():
        for read in op.reads:
            found.setdefault((read.segment, rank), set()).add(op.segment)
    return {key: tuple(sorted(segments)) for key, segments in found.items()}
