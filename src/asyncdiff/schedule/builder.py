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
    forecast: str = "latents",
    freshness: str = "auto",
    crossings: Iterable[tuple[int, int]] | None = None,
    fresh_crossings: Iterable[tuple[int, int]] = (),
    in_order_steps: Collection[int] = (),
    driver_computes: bool = True,
    refresh_every: int = 1,
) -> Schedule:
    """The schedule of steps `first_step` to `num_steps - 1`; warm-up is the first `warmup_steps` of them.

    `crossings`: the (producing segment, reading segment) pairs between which the graph hands anything over
    that is read late (`Wiring.crossings`); None for every pair that can exist. `fresh_crossings`: those
    between which it hands over anything that is read in the round that produces it, with freshness "auto".
    `in_order_steps`: steps that run in order after warm-up, where a round would begin with them.
    `driver_computes`: whether rank 0 holds stage 0, or no stage. `refresh_every`: after warm-up, of how many
    steps the last one is predicted (section 7); nothing is computed for the others.
    Raises `ConfigurationError` for settings that have no schedule.
    """
    settings = Settings(
        num_stages, stride, warmup_steps, time_shift, forecast, freshness, guidance_refresh=refresh_every
    )
    check_count("first_step", first_step, least=0)
    check_count("num_steps", num_steps, least=first_step + 1)
    stages = _segment_stages(kind, num_stages)
    if refresh_every > 1 and len(set(stages)) < len(stages):
        raise ConfigurationError("Of a nested split every step is predicted.")
    if freshness == "paper" and fresh_crossings:
        raise ConfigurationError('freshness="paper" reads nothing in the round that produces it.')
    rules = _Rules(
        settings,
        stages,
        first_step,
        num_steps,
        _checked_crossings(stages, crossings),
        _checked_crossings(stages, fresh_crossings),
        frozenset(in_order_steps),
        first_worker=0 if driver_computes else 1,
    )
    _refuse_return(rules)
    drafts = _drop_unused(list(_draft_rounds(rules)), rules)
    return Schedule(
        kind=kind, num_stages=num_stages, stride=stride, warmup_steps=warmup_steps, num_steps=num_steps,
        first_step=first_step, time_shift=time_shift, forecast=forecast, freshness=freshness,
        segment_stage=stages, driver_computes=driver_computes, refresh_every=refresh_every,
        rounds=place_transfers(drafts, rules.first_worker + settings.num_workers, rules.last_segment),
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


def _refuse_return(rules: _Rules) -> None:
    """States for steps to come would be made twice if one of those ran in order."""
    steps = range(rules.first_step, rules.num_steps)
    first = next((step for step in steps if not rules.is_in_order(step)), rules.num_steps)
    later = [step for step in steps if step > first and rules.is_in_order(step)]
    if later and rules.lead(0):
        raise ConfigurationError(
            f'forecast="latents" works ahead, so step {later[0]} cannot run in order after one that did not.'
        )


@dataclass(frozen=True)
class _Rules:
    """The settings and layout, as the questions a round asks."""

    settings: Settings
    segment_stage: tuple[int, ...]
    first_step: int
    num_steps: int
    crossings: frozenset[tuple[int, int]]
    fresh_crossings: frozenset[tuple[int, int]]
    in_order_steps: frozenset[int]
    first_worker: int

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

    def is_predicted(self, step: int) -> bool:
        """Whether anybody asks for the prediction of a step."""
        return self.is_in_order(step) or (step + 1 - self.warmup_end) % self.settings.guidance_refresh == 0

    def runs_per_step(self, segment: int) -> bool:
        """Whether the segment is of the replicated stage, the one that runs once per step of a round."""
        return self.segment_stage[segment] == self.segment_stage[-1]

    def is_outer_start(self, segment: int) -> bool:
        """Whether it is E of a nested split."""
        return segment != self.last_segment and self.runs_per_step(segment)

    def rank(self, segment: int, copy: int) -> int:
        worker = self.segment_stage[segment] if copy == 0 else self.settings.num_stages - 1 + copy
        return self.first_worker + worker

    def condition(self, step: int) -> int:
        """The step whose timestep conditions an evaluation for `step` (section 4)."""
        return step - 1 if self.settings.time_shift and step >= self.warmup_end else step

    @property
    def continues_latents(self) -> bool:
        return self.settings.forecast == "latents"

    def lead(self, segment: int) -> int:
        """For how many rounds ahead a segment works, so that who reads it gets what was made for the step
        at hand.

        As many as its output is on its way to the prediction, where that is the only way there is: every
        line on it would add to the error of those before. Where skips lead past stages, most of the
        prediction rests on them, and latents continued over one round are better than over several. But where
        only some steps are predicted, as a line would take states that nobody else needs. Not in a nested
        split, where Z reads what E has just made of the latents as they are.
        """
        if not self.continues_latents or any(map(self.is_outer_start, range(self.last_segment))):
            return 0
        has_skips = any(reader - producer > 1 for producer, reader in self.crossings | self.fresh_crossings)
        on_its_way = self.last_segment - segment
        return min(1, on_its_way) if has_skips and self.settings.guidance_refresh == 1 else on_its_way

    def label(self, segment: int, past: _Past) -> int:
        """The step that the state is for which a segment has left behind in a round."""
        ahead = 0 if past.in_order else self.settings.stride * self.lead(segment)
        return past.first_step + ahead

    def sources(self, reader: int) -> Iterator[tuple[int, bool]]:
        """(producer, whether it is read fresh) for everything that a segment reads."""
        for producer in range(reader):
            if (producer, reader) in self.crossings:
                yield producer, False
            if (producer, reader) in self.fresh_crossings:
                yield producer, True


@dataclass(frozen=True)
class _Past:
    """A round whose states may still be read."""

    first_step: int
    in_order: bool


def _draft_rounds(rules: _Rules) -> Iterator[Draft]:
    """All rounds with every computation they could have, used or not."""
    states: tuple[_Past, ...] = ()  # newest first
    start = rules.first_step
    while start < rules.num_steps:
        if rules.is_in_order(start):
            draft = Draft((start,), True, tuple(_in_order(rules, start)))
        else:
            steps = tuple(range(start, min(start + rules.settings.stride, rules.num_steps)))
            draft = Draft(steps, False, tuple(_in_parallel(rules, steps, states)))
        yield draft
        states = (_Past(start, draft.in_order), *states[: rules.last_segment + 1])
        start = draft.steps[-1] + 1


def _in_order(rules: _Rules, step: int) -> Iterator[tuple[int, Compute]]:
    """The stages one after the other, each reading what was just produced."""
    for segment in range(rules.last_segment + 1):
        reads = tuple(_as_it_is(producer, step, fresh) for producer, fresh in rules.sources(segment))
        yield rules.rank(segment, 0), Compute(segment, step, Value(segment, step), step, step, step, reads)


def _in_parallel(
    rules: _Rules, steps: tuple[int, ...], states: tuple[_Past, ...]
) -> Iterator[tuple[int, Compute]]:
    """An asynchronous round: the replicated stage once per step, the others once for the whole round.

    The paper conditions the latter on the timestep of the last step. A forecast needs to know which step a
    state belongs to, so with one they are conditioned on that of the first, whose latents they read; where
    the latents are continued, on that of the first step of the round that the state is made for.
    """
    b = steps[0]
    this = _Past(b, in_order=False)
    for segment in range(rules.last_segment + 1):
        if rules.runs_per_step(segment):
            for copy, step in enumerate(steps):
                label = _copy_label(rules, segment, copy, steps)
                yield rules.rank(segment, copy), _compute(rules, segment, step, label, this, step, states)
        else:
            label = rules.label(segment, this)
            timed_step = label if rules.forecasts else steps[-1]
            yield rules.rank(segment, 0), _compute(rules, segment, b, label, this, timed_step, states)


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
    rules: _Rules,
    segment: int,
    step: int,
    label: int,
    this: _Past,
    timed_step: int,
    states: tuple[_Past, ...],
) -> Compute:
    """One asynchronous computation; `timed_step`: whose timestep conditions it, before time shift."""
    reads = tuple(
        _read(rules, producer, fresh, timed_step, (this, *states))
        for producer, fresh in rules.sources(segment)
    )
    b = this.first_step
    latents_step = timed_step if rules.continues_latents else b
    value, condition = Value(segment, label), rules.condition(timed_step)
    return Compute(segment, step, value, b, latents_step, condition, reads)


def _as_it_is(producer: int, step: int, fresh: bool) -> Read:
    return Read(producer, (Term(Value(producer, step), 1.0),), fresh)


def _read(rules: _Rules, producer: int, fresh: bool, needed_step: int, rounds: tuple[_Past, ...]) -> Read:
    """The state that was made for the step needed; else the line through the two nearest to it continued to
    that step (section 5), or the newest without a forecast.

    `rounds`: this one and those before it, newest first. What is read fresh may be of this one (section 6). E
    is read as it is: the inner stages have the timestep of the copy that made it.
    """
    if rules.is_outer_start(producer) and rules.settings.freshness == "auto":
        return _as_it_is(producer, rounds[0].first_step, fresh)
    labels = [rules.label(producer, past) for past in (rounds if fresh else rounds[1:])]
    labels = [label for label in labels if label < rules.num_steps]
    if not rules.forecasts or len(labels) == 1:
        return _as_it_is(producer, labels[0], fresh)
    if needed_step in labels:
        return _as_it_is(producer, needed_step, fresh)
    nearest = sorted(labels, key=lambda label: (abs(needed_step - label), -label))[:2]
    newer, older = sorted(nearest, reverse=True)
    r = (needed_step - newer) / (newer - older)
    terms = (Term(Value(producer, newer), 1.0 + r), Term(Value(producer, older), -r))
    return Read(producer, terms, fresh, damped=rules.settings.forecast == "damped")


def _drop_unused(drafts: list[Draft], rules: _Rules) -> list[Draft]:
    """Only what ends up in a prediction: C0 of the last step goes, and whatever only feeds it."""
    used: set[Value] = set()
    kept: list[Draft] = []
    for draft in reversed(drafts):
        computes: list[tuple[int, Compute]] = []
        for rank, compute in reversed(draft.computes):
            # Every Z predicts, and E is part of its forward without being one of its reads.
            predicts = rules.runs_per_step(compute.segment) and rules.is_predicted(compute.step)
            if predicts or compute.value in used:
                used.update(term.value for read in compute.reads for term in read.terms)
                computes.append((rank, compute))
        kept.append(Draft(draft.steps, draft.in_order, tuple(reversed(computes))))
    return kept[::-1]
