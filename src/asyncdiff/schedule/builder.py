"""From settings to a schedule: what each round computes, what of it is used, and what must then be sent.

Three passes over frozen values: draft every round's computations with their reads (docs/method.md, sections
1 to 6), drop what nobody uses, and place the transfers that the remaining reads need.

N stages, S stride; b the first step of a round; E and Z the two segments of stage 0 of a nested split.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
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
    freshness: str = "auto",
    crossings: Iterable[tuple[int, int]] | None = None,
    fresh_crossings: Iterable[tuple[int, int]] = (),
    in_order_steps: Collection[int] = (),
) -> Schedule:
    """The schedule of steps `first_step` to `num_steps - 1`; warm-up is the first `warmup_steps` of them.

    `crossings`: the (producing segment, reading segment) pairs between which the graph hands anything over
    that is read late (`Wiring.crossings`); None for every pair that can exist. `fresh_crossings`: those
    between which it hands over anything that is read in the round that produces it, with freshness "auto".
    `in_order_steps`: steps that run in order after warm-up, where a round would begin with them.
    Raises `ConfigurationError` for settings that have no schedule.
    """
    settings = Settings(num_stages, stride, warmup_steps, time_shift, forecast, freshness)
    check_count("first_step", first_step, least=0)
    check_count("num_steps", num_steps, least=first_step + 1)
    stages = _segment_stages(kind, num_stages)
    if freshness == "paper" and fresh_crossings:
        raise ConfigurationError('freshness="paper" reads nothing in the round that produces it.')
    rules = _Rules(
        settings,
        stages,
        first_step,
        _checked_crossings(stages, crossings),
        _checked_crossings(stages, fresh_crossings),
        frozenset(in_order_steps),
    )
    drafts = _drop_unused(list(_draft_rounds(rules, num_steps)), rules)
    return Schedule(
        kind=kind, num_stages=num_stages, stride=stride, warmup_steps=warmup_steps, num_steps=num_steps,
        first_step=first_step, time_shift=time_shift, forecast=forecast, freshness=freshness,
        segment_stage=stages,
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
    fresh_crossings: frozenset[tuple[int, int]]
    in_order_steps: frozenset[int]

    @property
    def last_segment(self) -> int:
        return len(self.segment_stage) - 1

    @property
    def warmup_end(self) -> int:
        return self.first_step + self.settings.warmup_steps

    @property
    def forecasts(self) -> bool:
        return self.settings.forecast != "none"

    def is_in_order(self, step: int) -> bool:
        return step < self.warmup_end or step in self.in_order_steps

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

    def sources(self, reader: int) -> Iterator[tuple[int, bool]]:
        """(producer, whether it is read fresh) for everything that a segment reads."""
        for producer in range(reader):
            if (producer, reader) in self.crossings:
                yield producer, False
            if (producer, reader) in self.fresh_crossings:
                yield producer, True


def _draft_rounds(rules: _Rules, num_steps: int) -> Iterator[Draft]:
    """All rounds with every computation they could have, used or not."""
    states: tuple[int, ...] = ()  # labels of the states there are, newest first; two at most are ever read
    start = rules.first_step
    while start < num_steps:
        if rules.is_in_order(start):
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
        reads = tuple(_as_it_is(producer, step, fresh) for producer, fresh in rules.sources(segment))
        yield rules.rank(segment, 0), Compute(segment, step, Value(segment, step), step, step, reads)


def _in_parallel(
    rules: _Rules, steps: tuple[int, ...], states: tuple[int, ...]
) -> Iterator[tuple[int, Compute]]:
    """An asynchronous round: the replicated stage once per step, the others once for the whole round.

    The paper conditions the latter on the timestep of the last step. A forecast needs to know which step a
    state belongs to, so with one they are conditioned on that of the first, whose latents they read.
    """
    b = steps[0]
    shared_step = b if rules.forecasts else steps[-1]
    for segment in range(rules.last_segment + 1):
        if rules.runs_per_step(segment):
            for copy, step in enumerate(steps):
                label = _copy_label(rules, segment, copy, steps)
                yield rules.rank(segment, copy), _compute(rules, segment, step, label, b, step, states)
        else:
            yield rules.rank(segment, 0), _compute(rules, segment, b, b, b, shared_step, states)


def _copy_label(rules: _Rules, segment: int, copy: int, steps: tuple[int, ...]) -> int:
    """The step in the name of what a copy of the replicated stage produces: the one it runs for, but in E
    without a forecast.

    The inner stages read E of the copy that has their timestep as the state of the round, so that is
    labelled b. Where it is the last one, copy 0, whose own E only its Z uses, takes the label that this
    leaves over.
    """
    if rules.is_outer_start(segment) and not rules.forecasts:
        return {0: steps[-1], len(steps) - 1: steps[0]}.get(copy, steps[copy])
    return steps[copy]


def _compute(
    rules: _Rules, segment: int, step: int, label: int, b: int, timed_step: int, states: tuple[int, ...]
) -> Compute:
    """One asynchronous computation; `timed_step`: whose timestep conditions it, before time shift."""
    reads = tuple(
        _read(rules, producer, fresh, b, timed_step, states) for producer, fresh in rules.sources(segment)
    )
    return Compute(segment, step, Value(segment, label), b, rules.condition(timed_step), reads)


def _as_it_is(producer: int, step: int, fresh: bool) -> Read:
    return Read(producer, (Term(Value(producer, step), 1.0),), fresh)


def _read(
    rules: _Rules, producer: int, fresh: bool, b: int, needed_step: int, states: tuple[int, ...]
) -> Read:
    """The newest state: of this round if it is read fresh (section 6), else of earlier rounds; or the line
    through the two newest continued to the step needed (section 5).

    E is read as it is: the inner stages have the timestep of the copy that made it.
    """
    if rules.is_outer_start(producer) and rules.settings.freshness == "auto":
        return _as_it_is(producer, b, fresh)
    labels = (b, *states) if fresh else states
    if not rules.forecasts or len(labels) < 2 or needed_step == labels[0]:
        return _as_it_is(producer, labels[0], fresh)
    r = (needed_step - labels[0]) / (labels[0] - labels[1])
    terms = (Term(Value(producer, labels[0]), 1.0 + r), Term(Value(producer, labels[1]), -r))
    return Read(producer, terms, fresh, damped=rules.settings.forecast == "damped")


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
