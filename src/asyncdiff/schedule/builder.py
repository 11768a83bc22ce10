"""From settings to a schedule: what each round computes, what of it is used, and what must then be sent.

Three passes over frozen values: draft every round's computations with their reads (docs/method.md, sections
1 to 6), drop what nobody uses, and place the transfers that the remaining reads need.

N stages, S stride; b the first step of a round; E and Z the two segments of stage 0 of a nested split.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from asyncdiff.config import Settings, check_count
from asyncdiff.errors import ConfigurationError
from asyncdiff.schedule.ops import Compute, Read, Term, Value
from asyncdiff.schedule.rounds import Schedule
from asyncdiff.schedule.transfers import Draft, place_transfers

KINDS = ("chain", "nested")


def build_schedule(
    *,
    kind: str,
    num_stages: int,
    stride: int,
    warmup_steps: int,
    num_steps: int,
    first_step: int = 0,
    time_shift: bool = False,
    forecast: str = "linear",
    crossings: Iterable[tuple[int, int]] | None = None,
) -> Schedule:
    """The schedule of steps `first_step` to `num_steps - 1`; warm-up is the first `warmup_steps` of them.

    `crossings`: the (producing segment, reading segment) pairs between which the graph hands anything over
    (`crossing_atoms`); None for every pair that can exist. Raises `ConfigurationError` for settings that
    have no schedule.
    """
    settings = Settings(num_stages, stride, warmup_steps, time_shift, forecast)
    check_count("first_step", first_step, least=0)
    check_count("num_steps", num_steps, least=first_step + 1)
    stages = _segment_stages(kind, num_stages)
    rules = _Rules(settings, stages, first_step, _checked_crossings(stages, crossings))
    drafts = _drop_unused(list(_draft_rounds(rules, num_steps)), rules)
    return Schedule(
        kind=kind, num_stages=num_stages, stride=stride, warmup_steps=warmup_steps, num_steps=num_steps,
        first_step=first_step, time_shift=time_shift, forecast=forecast, segment_stage=stages,
        rounds=place_transfers(drafts, settings.num_workers, rules.last_segment),
    )  # fmt: skip


def _segment_stages(kind: str, num_stages: int) -> tuple[int, ...]:
    if kind not in KINDS:
        raise ConfigurationError(f'kind must be "chain" or "nested", but {kind!r} was given.')
    chain = tuple(range(num_stages))
    return (*chain, 0) if kind == "nested" and num_stages > 1 else chain


def _checked_crossings(
    segment_stage: tuple[int, ...], crossings: Iterable[tuple[int, int]] | None
) -> frozenset[tuple[int, int]]:
    segments = range(len(segment_stage))
    possible = frozenset((i, j) for j in segments for i in range(j) if segment_stage[i] != segment_stage[j])
    if crossings is None:
        return possible
    given = frozenset((producer, reader) for producer, reader in crossings)
    if not given <= possible:
        raise ConfigurationError(
            f"Nothing can cross between the segments {sorted(given - possible)}: a reader comes after its "
            f"producer and on another stage. Possible are {sorted(possible)}."
        )
    return given


@dataclass(frozen=True)
class _Rules:
    """The settings and layout, as the questions a round asks."""

    settings: Settings
    segment_stage: tuple[int, ...]
    first_step: int
    crossings: frozenset[tuple[int, int]]

    @property
    def last_segment(self) -> int:
        return len(self.segment_stage) - 1

    @property
    def warmup_end(self) -> int:
        return self.first_step + self.settings.warmup_steps

    def runs_per_step(self, segment: int) -> bool:
        """Whether the segment is of the replicated stage, the one that runs once per step of a round."""
        return self.segment_stage[segment] == self.segment_stage[-1]

    def is_outer_start(self, segment: int) -> bool:
        """Whether it is E of a nested split."""
        return segment != self.last_segment and self.runs_per_step(segment)

    def rank(self, segment: int, copy: int) -> int:
        return self.segment_stage[segment] if copy == 0 else self.settings.num_stages - 1 + copy

    def condition(self, step: int) -> int:
        """The step whose timestep conditions an evaluation for `step` (section 4)."""
        return step - 1 if self.settings.time_shift and step >= self.warmup_end else step

    def producers(self, reader: int) -> list[int]:
        return [producer for producer in range(reader) if (producer, reader) in self.crossings]


def _draft_rounds(rules: _Rules, num_steps: int) -> Iterator[Draft]:
    """All rounds with every computation they could have, used or not."""
    states: tuple[int, ...] = ()  # labels of the states there are, newest first; two at most are ever read
    start = rules.first_step
    while start < num_steps:
        if start < rules.warmup_end:
            draft = Draft((start,), True, tuple(_in_order(rules, start)))
        else:
            steps = tuple(range(start, min(start + rules.settings.stride, num_steps)))
            draft = Draft(steps, False, tuple(_in_parallel(rules, steps, states)))
        yield draft
        states = (start, *states[:1])
        start = draft.steps[-1] + 1


def _in_order(rules: _Rules, step: int) -> Iterator[tuple[int, Compute]]:
    """The stages one after the other, each reading what was just produced."""
    for segment in range(rules.last_segment + 1):
        reads = tuple(_fresh(producer, step) for producer in rules.producers(segment))
        yield rules.rank(segment, 0), Compute(segment, step, Value(segment, step), step, step, reads)


def _in_parallel(
    rules: _Rules, steps: tuple[int, ...], states: tuple[int, ...]
) -> Iterator[tuple[int, Compute]]:
    """An asynchronous round: the replicated stage once per step, the others once for the whole round."""
    for segment in range(rules.last_segment + 1):
        if rules.runs_per_step(segment):
            for copy, step in enumerate(steps):
                label = _copy_label(rules, segment, copy, steps)
                yield rules.rank(segment, copy), _compute(rules, segment, step, label, steps[0], step, states)
        else:
            b = steps[0]
            yield rules.rank(segment, 0), _compute(rules, segment, b, b, b, steps[-1], states)


def _copy_label(rules: _Rules, segment: int, copy: int, steps: tuple[int, ...]) -> int:
    """The step in the name of what a copy of the replicated stage produces: the one it runs for, but in E.

    The inner stages read E of the last copy (it has their timestep) as the state of the round, so that is
    labelled b. Copy 0, whose own E only its Z uses, takes the label that this leaves over.
    """
    if rules.is_outer_start(segment):
        return {0: steps[-1], len(steps) - 1: steps[0]}.get(copy, steps[copy])
    return steps[copy]


def _compute(
    rules: _Rules, segment: int, step: int, label: int, b: int, timed_step: int, states: tuple[int, ...]
) -> Compute:
    """One asynchronous computation; `timed_step`: whose timestep conditions it, before time shift."""
    reads = tuple(_read(rules, producer, b, timed_step, states) for producer in rules.producers(segment))
    return Compute(segment, step, Value(segment, label), b, rules.condition(timed_step), reads)


def _fresh(producer: int, step: int) -> Read:
    return Read(producer, (Term(Value(producer, step), 1.0),))


def _read(rules: _Rules, producer: int, b: int, needed_step: int, states: tuple[int, ...]) -> Read:
    """E of this round where that is the producer (section 6), else the newest state of earlier rounds, or the
    line through the two newest continued to the step needed (section 5)."""
    if rules.is_outer_start(producer):
        return _fresh(producer, b)
    newest = Value(producer, states[0])
    if rules.settings.forecast == "none" or len(states) < 2:
        return Read(producer, (Term(newest, 1.0),))
    r = (needed_step - states[0]) / (states[0] - states[1])
    return Read(producer, (Term(newest, 1.0 + r), Term(Value(producer, states[1]), -r)))


def _drop_unused(drafts: list[Draft], rules: _Rules) -> list[Draft]:
    """Only what ends up in a prediction: C0 of the last step goes, and whatever only feeds it."""
    used: set[Value] = set()
    kept: list[Draft] = []
    for draft in reversed(drafts):
        computes: list[tuple[int, Compute]] = []
        for rank, compute in reversed(draft.computes):
            # Every Z predicts, and E is part of its forward without being one of its reads.
            if rules.runs_per_step(compute.segment) or compute.value in used:
                used.update(term.value for read in compute.reads for term in read.terms)
                computes.append((rank, compute))
        kept.append(Draft(draft.steps, draft.in_order, tuple(reversed(computes))))
    return kept[::-1]
