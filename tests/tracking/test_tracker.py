"""Where a denoiser call stands, from the events of a noise scheduler alone."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncdiff.tracking import Extent, Position, Tracker
from asyncdiff.tracking.tracker import MAX_CALLS_PER_STEP, MAX_COUNT_CHANGES


def opened(num_timesteps: int | None = 10, first: int = 0) -> Tracker:
    tracker = Tracker()
    tracker.open_run(Extent(num_timesteps, first))
    return tracker


def run_steps(tracker: Tracker, steps: range, *contexts: str | None) -> list[list[Position]]:
    """A pipeline's loop: one call per context (None: unnamed), then the noise scheduler's step."""
    positions = []
    for step in steps:
        positions.append([tracker.place(context) for context in contexts or (None,)])
        tracker.close_step(1000 - step)
    return positions


def test_calls_of_a_run_are_its_steps_in_order() -> None:
    positions = [p for (p,) in run_steps(opened(5), range(5))]
    assert [p.step for p in positions] == [0, 1, 2, 3, 4]
    assert all(p.placed and p.channel == 0 and p.num_steps == 5 and p.first_step == 0 for p in positions)
    assert [p.new_run for p in positions] == [True, False, False, False, False]
    assert all(p.new_step and p.run == 0 for p in positions)


def test_call_without_a_run_is_not_placed() -> None:
    position = Tracker().place()
    assert not position.placed
    assert position.reason == "no run is open"
    assert position.run == -1


def test_step_without_a_run_is_ignored() -> None:
    tracker = Tracker()
    tracker.close_step(3)
    tracker.open_run(Extent(4, 0))
    assert tracker.place().step == 0


def test_call_beyond_the_last_step_is_not_placed() -> None:
    tracker = opened(2)
    run_steps(tracker, range(2))
    position = tracker.place()
    assert not position.placed
    assert "2 steps" in (position.reason or "")


def test_begin_index_shortens_the_run_and_shifts_the_timestep_index() -> None:
    positions = [p for (p,) in run_steps(opened(10, first=7), range(3))]
    assert [(p.step, p.timestep_index, p.num_steps) for p in positions] == [(0, 7, 3), (1, 8, 3), (2, 9, 3)]


def test_extent_is_asked_for_at_the_first_call_only() -> None:
    asked = []

    def extent(hint: object, step: int) -> Extent:
        asked.append((hint, step))
        return Extent(20, 4)

    tracker = Tracker()
    tracker.open_run(extent)
    assert asked == []
    assert tracker.place(hint="timestep argument").num_steps == 16
    tracker.close_step(1)
    assert tracker.place(hint="another").timestep_index == 5
    assert asked == [("timestep argument", 0)]


def test_unknown_number_of_timesteps_never_ends() -> None:
    positions = run_steps(opened(None), range(50))
    assert all(p.placed and p.num_steps is None for (p,) in positions)


def test_setting_timesteps_twice_before_the_first_call_opens_one_run() -> None:
    tracker = opened(50)
    tracker.open_run(Extent(4, 0))
    position = tracker.place()
    assert (position.run, position.step, position.num_steps, position.new_run) == (0, 0, 4, True)


def test_setting_timesteps_in_the_middle_opens_a_new_run() -> None:
    tracker = opened(10)
    run_steps(tracker, range(3))
    tracker.place()  # interrupted: this call was never followed by a step
    tracker.open_run(Extent(6, 0))
    position = tracker.place()
    assert (position.run, position.step, position.channel, position.num_steps) == (1, 0, 0, 6)
    assert position.new_run
    assert position.new_step


def test_run_stopped_early_and_run_again() -> None:
    tracker = opened(10)
    run_steps(tracker, range(8))  # denoising_end, or pipe._interrupt set by a callback
    tracker.open_run(Extent(10, 0))
    assert [p.step for (p,) in run_steps(tracker, range(10))] == list(range(10))


def test_unnamed_calls_of_a_step_are_numbered_channels() -> None:
    positions = run_steps(opened(4), range(4), None, None, None)
    for step, calls in enumerate(positions):
        assert [(p.step, p.channel, p.new_step) for p in calls] == [
            (step, 0, True),
            (step, 1, False),
            (step, 2, False),
        ]
    assert [p.new_run for p in positions[0]] == [True, False, False]


def test_named_calls_are_told_apart_whatever_their_order() -> None:
    tracker = opened(4)
    (first,) = run_steps(tracker, range(1), "cond", "uncond")
    (second,) = run_steps(tracker, range(1, 2), "uncond", "cond")
    assert [p.channel for p in first + second] == ["cond", "uncond", "uncond", "cond"]
    assert all(p.first_step == 0 for p in second)


def test_second_call_of_the_same_name_is_a_channel_of_its_own() -> None:
    positions = run_steps(opened(3), range(3), "cond", "cond", "uncond")
    assert [[p.channel for p in calls] for calls in positions] == [["cond", "cond#1", "uncond"]] * 3


def test_named_channel_that_pauses_starts_again() -> None:
    """Guidance within an interval: when `uncond` returns, its states are older than one step."""
    tracker = opened(8)
    run_steps(tracker, range(2), "cond", "uncond")
    run_steps(tracker, range(2, 4), "cond")
    later = run_steps(tracker, range(4, 6), "cond", "uncond")
    assert [[(p.channel, p.first_step, p.placed) for p in calls] for calls in later] == [
        [("cond", 0, True), ("uncond", 4, True)]
    ] * 2


def test_unnamed_channels_start_again_when_their_number_changes() -> None:
    """Call 0 of two is not known to be call 0 of one."""
    tracker = opened(8)
    run_steps(tracker, range(2), None)
    positions = run_steps(tracker, range(2, 5), None, None)
    assert [[p.first_step for p in calls] for calls in positions] == [[0, 2], [3, 3], [3, 3]]


def test_number_of_unnamed_calls_that_keeps_changing_is_not_placed() -> None:
    tracker = opened(20)
    for step in range(MAX_COUNT_CHANGES + 2):
        (calls,) = run_steps(tracker, range(step, step + 1), *([None] * (1 + step % 2)))
        assert all(p.placed for p in calls)
    (calls,) = run_steps(tracker, range(4, 5), None, "named")
    assert [p.placed for p in calls] == [False, True]
    assert "has changed 3 times" in (calls[0].reason or "")
    tracker.open_run(Extent(5, 0))
    assert tracker.place().placed


def test_calls_without_steps_stay_in_step_0_and_their_number_is_bounded() -> None:
    tracker = opened(10)
    positions = [tracker.place() for _ in range(MAX_CALLS_PER_STEP + 2)]
    assert all(p.step == 0 for p in positions)
    assert [p.placed for p in positions] == [True] * MAX_CALLS_PER_STEP + [False, False]


def test_step_called_once_per_image_of_a_batch_is_one_step() -> None:
    tracker = opened(3)
    for step, timestep in enumerate((900, 500, 100)):
        assert tracker.place().step == step
        for _image in range(4):
            tracker.close_step(timestep)


def test_steps_without_evaluation_are_counted() -> None:
    """A callback or cache that skips the denoiser at two steps; the channel's states are then too old."""
    tracker = opened(6)
    run_steps(tracker, range(2))
    tracker.close_step(700)
    tracker.close_step(600)
    position = tracker.place()
    assert (position.step, position.first_step) == (4, 4)


def test_repeated_timestep_after_a_call_is_the_next_step() -> None:
    tracker = opened(4)
    for step, timestep in enumerate((981, 961, 961, 941)):  # PNDM with skip_prk_steps
        position = tracker.place()
        assert (position.step, position.channel) == (step, 0)
        tracker.close_step(timestep)


def test_second_of_two_denoisers_begins_where_the_first_ends() -> None:
    """Wan 2.2: steps 0-2 are another denoiser's, whose calls this tracker is not told about."""
    asked = []

    def extent(hint: object, step: int) -> Extent:
        asked.append(step)
        return Extent(5, 0)

    tracker = Tracker()
    tracker.open_run(extent)
    for timestep in (999, 900, 800):
        tracker.close_step(timestep)
    position = tracker.place()
    assert (position.step, position.first_step, position.num_steps, position.new_run) == (3, 3, 5, True)
    assert asked == [3]


def test_steps_of_another_noise_scheduler_are_ignored() -> None:
    tracker = Tracker()
    tracker.open_run(Extent(5, 0), source="a")
    tracker.place()
    tracker.close_step(1, source="b")
    assert tracker.place().channel == 1
    tracker.close_step(1, source="a")
    assert tracker.place().step == 1


def test_closing_the_run_of_another_noise_scheduler_changes_nothing() -> None:
    tracker = Tracker()
    tracker.open_run(Extent(5, 0), source="a")
    tracker.close_run(source="b")
    assert tracker.place().placed
    tracker.close_run(source="a")
    assert not tracker.place().placed


@pytest.mark.parametrize("first", [4, 5])
def test_begin_index_at_or_past_the_end_leaves_no_steps(first: int) -> None:
    position = opened(4, first=first).place()
    assert position.num_steps == 0
    assert not position.placed


# An independent model: the answer to each call computed anew from the whole list of events.


@dataclass(frozen=True)
class Open:
    num_timesteps: int
    first: int


@dataclass(frozen=True)
class Close:
    timestep: int


@dataclass(frozen=True)
class Call:
    context: str | None


def expected(events: list[Open | Close | Call]) -> tuple[object, ...] | None:
    """(step, channel, num_steps, placed, first_step, new_step) of the call that ends `events`."""
    call = events[-1]
    opens = [i for i, event in enumerate(events) if isinstance(event, Open)]
    if not opens:
        return None
    run = events[opens[-1]]
    steps: list[list[str | None]] = [[]]  # the calls of each step
    last: Close | None = None
    for event in events[opens[-1] + 1 :]:
        if isinstance(event, Call):
            steps[-1].append(event.context)
        elif not steps[-1] and len(steps) > 1 and event == last:
            pass
        else:
            steps.append([])
            last = event
    step, same_name = len(steps) - 1, [names.count(call.context) for names in steps]
    ordinal = same_name[-1] - 1
    changed = [
        s for s in range(1, step) if same_name[s] != same_name[s - 1] and same_name[s] * same_name[s - 1]
    ]
    first_step = step
    while first_step > 0 and first_step - 1 not in changed and same_name[first_step - 1] > ordinal:
        first_step -= 1
    num_steps = run.num_timesteps - run.first
    placed = step < num_steps and len(changed) <= 2
    name = call.context if ordinal == 0 else f"{call.context}#{ordinal}"
    channel = ordinal if call.context is None else name
    return step, channel, num_steps, placed, first_step if placed else step, len(steps[-1]) == 1


EVENTS = st.lists(
    st.one_of(
        st.builds(Open, st.integers(3, 12), st.integers(0, 3)),
        *[st.builds(Close, st.integers(0, 4))] * 4,
        *[st.builds(Call, st.sampled_from([None, None, None, "cond", "uncond"]))] * 6,
    ),
    max_size=60,
)


@settings(max_examples=400, deadline=None)
@given(EVENTS)
def test_agrees_with_a_model_that_recounts_all_events(events: list[Open | Close | Call]) -> None:
    tracker = Tracker()
    for index, event in enumerate(events):
        if isinstance(event, Open):
            tracker.open_run(Extent(event.num_timesteps, event.first))
        elif isinstance(event, Close):
            tracker.close_step(event.timestep)
        else:
            p = tracker.place(event.context)
            answer = expected(events[: index + 1])
            if answer is None:
                assert not p.placed
            else:
                assert (p.step, p.channel, p.num_steps, p.placed, p.first_step, p.new_step) == answer


@settings(max_examples=200, deadline=None)
@given(EVENTS)
def test_placed_calls_of_a_channel_follow_one_another_without_gap(events: list[Open | Close | Call]) -> None:
    tracker = Tracker()
    last: dict[tuple[int, object], Position] = {}
    for event in events:
        if isinstance(event, Open):
            tracker.open_run(Extent(event.num_timesteps, event.first))
        elif isinstance(event, Close):
            tracker.close_step(event.timestep)
        elif (p := tracker.place(event.context)).placed:
            before = last.get((p.run, p.channel))
            if p.step != p.first_step:
                assert before is not None
                assert (before.step, before.first_step) == (p.step - 1, p.first_step)
            last[p.run, p.channel] = p
