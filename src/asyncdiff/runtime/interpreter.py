"""Interprets one rank's operations of a round: receives, forwards of its stage, sends.

The same code runs in the local executor, in the driver (rank 0) and in the workers; only the `Link` differs.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch

from asyncdiff.graph import Atom, TensorSpec
from asyncdiff.graph.wiring import Wiring
from asyncdiff.protocol.messages import LatentsScale, RoundInfo, RoundRecord
from asyncdiff.runtime.awaited import arrived
from asyncdiff.runtime.interrupts import interrupts_deferred
from asyncdiff.runtime.link import Link, Parcel, Pending, Stream
from asyncdiff.runtime.trend import Trend
from asyncdiff.schedule.ops import Compute, Op, Predict, Read, Recv, Send, SendPrediction, Value
from asyncdiff.stage import StageReplica
from asyncdiff.weights.ownership import empty_tensor

_ERROR = TensorSpec((), (), "float32")


@dataclass(frozen=True)
class RoundTask:
    """One rank's part of a round. `tensors`: the inputs of the round's first step that its stage reads."""

    info: RoundInfo
    ops: tuple[Op, ...]
    tensors: Mapping[str, torch.Tensor]


class StageInterpreter:
    """One rank: a stage replica and the states it has received from others.

    `rank_stages[r]` is the stage of rank r; a driver may have none, and no `replica`.
    """

    def __init__(
        self,
        rank: int,
        rank_stages: tuple[int | None, ...],
        replica: StageReplica | None,
        link: Link,
        device: torch.device,
    ) -> None:
        self.rank = rank
        self.stage = rank_stages[rank]
        self._device = device
        self._rank_stages = rank_stages
        self._replica = replica
        self._link = link
        self._wirings: dict[int, Wiring] = {}
        self._states: dict[tuple[int, Hashable], States] = {}
        self._predictions: dict[tuple[int, Hashable, int], list[Pending]] = {}
        self._debts: dict[tuple[int, Parcel], TensorSpec] = {}
        self._records: list[RoundRecord] = []
        self.where: tuple[int | None, str] = (None, "")

    def relink(self, link: Link) -> None:
        """Use another transport from now on."""
        self._link = link

    def wire(self, key: int, wiring: Wiring) -> None:
        """What crosses for an input structure; the replica must have been prepared for it."""
        self._wirings[key] = wiring

    def discard(self, key: int) -> None:
        """Forget an input structure, here and in the replica; nothing happens if it is not there."""
        self._wirings.pop(key, None)
        if self._replica is not None:
            self._replica.discard(key)

    def run_round(self, task: RoundTask) -> None:
        """Carry out the rank's operations. After an exception `settle` must come before the next round."""
        self.post(task)
        self.compute(task)

    def post(self, task: RoundTask) -> None:
        """Note what the round owes and ask for all it receives, before anything is computed."""
        self.where = (task.info.first_step, "posting its transfers")
        wiring = self._wirings[task.info.key]
        states = self._states.setdefault((task.info.run, task.info.channel), States())
        self._debts = dict(self._owed(task, wiring))
        for op in task.ops:
            if isinstance(op, Recv):
                states.expect(op.value, self._receive_state(task, wiring, op))
            elif isinstance(op, Predict) and op.from_rank != self.rank:
                self._predictions[task.info.run, task.info.channel, op.step] = self._receive_prediction(
                    task, wiring, op
                )

    def compute(self, task: RoundTask) -> None:
        """The forwards of a posted round."""
        clock = _Clock()
        wiring, states = self._wirings[task.info.key], self._states[task.info.run, task.info.channel]
        for computes in _forwards(task.ops):
            self._forward(task, wiring, states, computes, clock)
        assert not self._debts, f"not sent: {[str(parcel) for _, parcel in self._debts]}"
        states.forget_before(task.info.history_depth)
        self._note(clock.record(task))

    def skip_round(self, task: RoundTask, lost_ranks: Collection[int] = ()) -> None:
        """Take part in the round's transfers without computing anything; what it would have predicted is not
        asked for."""
        self.post(task)
        self.settle(lost_ranks)
        for op in task.ops:
            if isinstance(op, Predict):
                self._predictions.pop((task.info.run, task.info.channel, op.step), None)

    def settle(self, lost_ranks: Collection[int] = ()) -> None:
        """Send fillers for whatever the last round still owes its peers: every transfer needs its match.

        Nothing is sent to `lost_ranks`. A transfer that fails is owed to a worker that died: the driver tells
        the others, which then join a new transport.
        """
        debts, self._debts = self._debts, {}
        for (rank, parcel), spec in debts.items():
            if rank not in lost_ranks:
                with suppress(RuntimeError):
                    self._link.send(rank, parcel, empty_tensor(spec, self._device).zero_(), spec)

    def prediction(self, run: int, channel: Hashable, step: int) -> list[torch.Tensor]:
        """The tensor leaves of a prediction, waited for; each prediction is handed out once."""
        return [leaf.wait() for leaf in self._predictions.pop((run, channel, step))]

    def end_runs(self, runs: tuple[int, ...]) -> None:
        """Forget the states, predictions and records of these runs."""
        self._states = {key: states for key, states in self._states.items() if key[0] not in runs}
        self._predictions = {key: leaves for key, leaves in self._predictions.items() if key[0] not in runs}
        self._records = [record for record in self._records if record.run not in runs]

    def take_records(self, run: int | None) -> tuple[RoundRecord, ...]:
        """What was recorded of a run (None: of all that have not been ended)."""
        return tuple(record for record in self._records if run is None or record.run == run)

    def _note(self, record: RoundRecord) -> None:
        """A round that is run again replaces what was noted of it."""
        if self._records and self._records[-1].is_of_same_round(record):
            self._records.pop()
        self._records.append(record)

    # -- transfers --

    def _owed(self, task: RoundTask, wiring: Wiring) -> Iterator[tuple[tuple[int, Parcel], TensorSpec]]:
        """Every tensor this rank has to send in the round, in order."""
        for op in task.ops:
            if isinstance(op, Send):
                for atom, spec in wiring.crossing[op.value.segment, _stage(self._rank_stages[op.to_rank])]:
                    yield (op.to_rank, _state_parcel(task, op.value, atom, op.to_rank)), spec
            elif isinstance(op, SendPrediction):
                for leaf, spec in enumerate(_prediction_specs(task, wiring)):
                    yield (0, _prediction_parcel(task, op.step, leaf)), spec

    def _pay(self, rank: int, parcel: Parcel, tensor: torch.Tensor, clock: _Clock) -> None:
        spec = self._debts[rank, parcel]
        tensor = arrived(tensor)
        with clock.measure(f"send to {rank}", "send"), interrupts_deferred():
            self._link.send(rank, parcel, tensor, spec)
            del self._debts[rank, parcel]
        clock.bytes_sent += spec.num_bytes

    def _receive_state(self, task: RoundTask, wiring: Wiring, op: Recv) -> dict[Atom, Pending]:
        return {
            atom: self._link.receive(op.from_rank, _state_parcel(task, op.value, atom, self.rank), spec)
            for atom, spec in wiring.crossing[op.value.segment, _stage(self.stage)]
        }

    def _receive_prediction(self, task: RoundTask, wiring: Wiring, op: Predict) -> list[Pending]:
        return [
            self._link.receive(op.from_rank, _prediction_parcel(task, op.step, leaf), spec)
            for leaf, spec in enumerate(_prediction_specs(task, wiring))
        ]

    # -- one forward of the stage --

    def _forward(
        self, task: RoundTask, wiring: Wiring, states: States, computes: dict[int, Compute], clock: _Clock
    ) -> None:
        first = next(iter(computes.values()))
        self.where = (first.step, f"forward of stage {self.stage}")
        assert self._replica is not None, "a rank without a stage computes nothing"
        recipients = _recipients(task.ops, computes)
        missed: list[torch.Tensor] = []

        def read(segment: int, atom: Atom, out: torch.Tensor | None) -> torch.Tensor:
            source = (wiring.segment_of[atom.block], atom in wiring.fresh[segment])
            how = next(r for r in computes[segment].reads if (r.segment, r.fresh) == source)
            with clock.measure(f"wait for {how.newest}", "wait"):
                if task.info.gauged is not None and not how.fresh:
                    missed.extend(states.gauge(how.newest, atom, task.info.gauged))
                return states.read(how, atom, out)

        def emit(atom: Atom, tensor: torch.Tensor) -> None:
            segment = wiring.segment_of[atom.block]
            for value, rank in recipients.get(segment, ()):
                parcel = _state_parcel(task, value, atom, rank)
                if (rank, parcel) in self._debts:  # else this reader does not use the leaf
                    self._pay(rank, parcel, tensor, clock)

        tensors, floats = _conditioned(task, first)
        if self._replica.takes_plain_tensors:
            tensors = {name: arrived(tensor) for name, tensor in tensors.items()}
        with clock.measure(f"stage {self.stage} step {first.step}", "compute"):
            output = self._replica.run(task.info.key, tensors, floats, read, emit)
        if output is not None and task.info.gauged is not None:
            output.append(self._largest(missed))
        self._deliver(task, first.step, output, clock)

    def _largest(self, errors: list[torch.Tensor]) -> torch.Tensor:
        """Of what a forward has read; 0 if that was nothing."""
        if not errors:
            return torch.zeros((), device=self._device)
        return torch.stack(errors).max()

    def _deliver(self, task: RoundTask, step: int, output: list[torch.Tensor] | None, clock: _Clock) -> None:
        for op in task.ops:
            if isinstance(op, SendPrediction) and op.step == step:
                for leaf, tensor in enumerate(_computed(output)):
                    self._pay(0, _prediction_parcel(task, step, leaf), tensor, clock)
            elif isinstance(op, Predict) and op.step == step and op.from_rank == self.rank:
                self._predictions[task.info.run, task.info.channel, step] = [
                    _Ready(arrived(leaf)) for leaf in _computed(output)
                ]


class States:
    """The versions of foreign values that have arrived or been asked for, of one run and channel."""

    def __init__(self) -> None:
        self._pending: dict[Value, dict[Atom, Pending]] = {}
        self._trends: defaultdict[Atom, Trend] = defaultdict(Trend)

    def expect(self, value: Value, leaves: dict[Atom, Pending]) -> None:
        """Note a value that is on its way, as the newest."""
        self._pending.pop(value, None)
        self._pending[value] = leaves

    def read(self, how: Read, atom: Atom, out: torch.Tensor | None = None) -> torch.Tensor:
        """The leaf as the read says: one version, or the line through two; in `out` if that is given.

        `lerp(newest, older, -r)` is newest + r (newest - older) in one kernel with float32 arithmetic inside.
        """
        newest = self._pending[how.newest][atom].wait()
        if len(how.terms) == 1 or not newest.is_floating_point():
            return newest if out is None else out.copy_(newest)
        older = self._pending[how.terms[1].value][atom].wait()
        weight: float | torch.Tensor = how.terms[1].weight
        if how.damped:
            trend = self._trends[atom]
            trend.observe(newest, older, (how.terms[0].value.step, how.terms[1].value.step))
            weight = trend.damping * weight
            if isinstance(weight, torch.Tensor):
                weight = weight.to(newest.dtype)
        return torch.lerp(newest, older, weight, out=out)

    def gauge(self, value: Value, atom: Atom, forecast: str) -> list[torch.Tensor]:
        """The relative error of what was forecast of a leaf: infinite where there was nothing to forecast it
        from, and none for what is not forecast."""
        newest = self._pending[value][atom].wait()
        if not newest.is_floating_point():
            return []
        before = [each for each in self._pending if each.segment == value.segment and each.step < value.step]
        if not before:
            return [torch.full((), math.inf, device=newest.device)]
        older = max(before, key=lambda each: each.step)
        trend = self._trends[atom]
        trend.observe(newest, self._pending[older][atom].wait(), (value.step, older.step))
        return [trend.error(forecast)]

    def forget_before(self, depth: int) -> None:
        """Keep the `depth` versions per segment that were asked for last."""
        by_segment: dict[int, list[Value]] = {}
        for value in self._pending:
            by_segment.setdefault(value.segment, []).append(value)
        for values in by_segment.values():
            for value in values[:-depth]:
                del self._pending[value]


@dataclass(frozen=True)
class _Ready:
    tensor: torch.Tensor

    def wait(self) -> torch.Tensor:
        return self.tensor


class _Clock:
    """Where the time of one round goes. Waits and sends inside a forward do not count as compute."""

    def __init__(self) -> None:
        self.bytes_sent = 0
        self._spans: list[tuple[str, str, float, float]] = []

    def measure(self, name: str, category: str) -> _Measured:
        return _Measured(self._spans, name, category)

    def record(self, task: RoundTask) -> RoundRecord:
        forwards = [span for span in self._spans if span[1] == "compute"]
        within = [
            span
            for span in self._spans
            if any(start < span[2] and span[3] < end for *_, start, end in forwards)
        ]  # a prediction is sent after its forward
        return RoundRecord(
            run=task.info.run,
            channel=task.info.channel,
            first_step=task.info.first_step,
            compute_s=_seconds(forwards) - _seconds(within),
            wait_s=_seconds(span for span in self._spans if span[1] == "wait"),
            bytes_sent=self.bytes_sent,
            spans=tuple(self._spans),
        )


def _seconds(spans: Iterable[tuple[str, str, float, float]]) -> float:
    return sum(end - start for _, _, start, end in spans)


class _Measured:
    """A span of one round."""

    def __init__(self, spans: list[tuple[str, str, float, float]], name: str, category: str) -> None:
        self._spans, self._name, self._category = spans, name, category

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        self._spans.append((self._name, self._category, self._start, time.perf_counter()))


def _forwards(ops: tuple[Op, ...]) -> Iterator[dict[int, Compute]]:
    """Computes of one step are one forward: by segment."""
    by_step: dict[int, dict[int, Compute]] = {}
    for op in ops:
        if isinstance(op, Compute):
            by_step.setdefault(op.step, {})[op.segment] = op
    yield from by_step.values()


def _recipients(ops: tuple[Op, ...], computes: dict[int, Compute]) -> dict[int, list[tuple[Value, int]]]:
    """Who is sent what these computes produce: by segment, (value, rank) pairs."""
    found: dict[int, list[tuple[Value, int]]] = {}
    for op in ops:
        if (
            isinstance(op, Send)
            and op.value.segment in computes
            and computes[op.value.segment].value == op.value
        ):
            found.setdefault(op.value.segment, []).append((op.value, op.to_rank))
    return found


def _conditioned(task: RoundTask, compute: Compute) -> tuple[Mapping[str, torch.Tensor], Mapping[str, float]]:
    """The task's inputs with the timestep and the scale of the latents that condition this evaluation."""
    condition = task.info.conditions.get(compute.condition_step)
    if condition is None:
        return task.tensors, task.info.floats
    tensors, floats = dict(task.tensors), dict(task.info.floats)
    if task.info.timestep_name in tensors:
        tensors[task.info.timestep_name] = condition.timestep
    elif task.info.timestep_name in floats:
        floats[task.info.timestep_name] = condition.timestep
    if condition.latents_scale is not None and task.info.latents_name in tensors:
        tensors[task.info.latents_name] = _scaled(tensors[task.info.latents_name], condition.latents_scale)
    return tensors, floats


def _scaled(model_input: torch.Tensor, scale: LatentsScale) -> torch.Tensor:
    scaled = model_input.clone()
    scaled.narrow(scale.dim, 0, scale.length).mul_(scale.factor)
    return scaled


def _stage(stage: int | None) -> int:
    assert stage is not None, "nothing crosses to a rank without a stage"
    return stage


def _computed(output: list[torch.Tensor] | None) -> list[torch.Tensor]:
    assert output is not None, "the stage that predicts returned no output"
    return output


def _prediction_specs(task: RoundTask, wiring: Wiring) -> tuple[TensorSpec, ...]:
    """Of the leaves of a prediction, and of the error that comes with it if it is asked for."""
    return wiring.outputs if task.info.gauged is None else (*wiring.outputs, _ERROR)


def _state_parcel(task: RoundTask, value: Value, atom: Atom, to_rank: int) -> Parcel:
    return Parcel(Stream.STATE, (task.info.run, task.info.channel, value, atom, to_rank))


def _prediction_parcel(task: RoundTask, step: int, leaf: int) -> Parcel:
    return Parcel(Stream.PREDICTION, (task.info.run, task.info.channel, step, leaf))
