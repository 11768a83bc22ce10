"""A schedule as text, and how old what it reads is."""

from __future__ import annotations

import pytest

from asyncdiff.schedule import build_schedule, render, staleness


def test_grid_of_two_stages_stride_two() -> None:
    schedule = build_schedule(
        kind="chain", num_stages=2, stride=2, warmup_steps=1, num_steps=6, forecast="linear"
    )
    assert render(schedule) == (
        "                      | step 0 in order     | steps 1-2           | steps 3-4             | step 5\n"
        "----------------------+---------------------+---------------------+-----------------------+"
        "----------------------\n"
        "rank 0 stage 0        | C0(x0; t0)          | C0(x1; t1)          | C0(x3; t3)            | -\n"
        "rank 1 stage 1        | C1(x0, H0(0); t0)>0 | C1(x1, H0(0); t1)>1 | C1(x3, H0(1~0); t3)>3 |"
        " C1(x5, H0(3~1); t5)>5\n"
        "rank 2 stage 1 copy 1 | -                   | C1(x1, H0(0); t2)>2 | C1(x3, H0(1~0); t4)>4 | -\n"
    )


def test_continued_latents_in_a_grid() -> None:
    schedule = build_schedule(kind="chain", num_stages=2, stride=2, warmup_steps=1, num_steps=6)
    *_, copy = render(schedule).splitlines()
    assert copy.split(" | ")[2:4] == ["C1(x1~2, H0(0); t2)>2", "C1(x3~4, H0(3~0); t4)>4"]


def test_what_was_made_for_the_step_rests_on_latents_as_old() -> None:
    """Without skips, stage 0 of four works three steps ahead."""
    schedule = build_schedule(
        kind="chain", num_stages=4, stride=1, warmup_steps=1, num_steps=12,
        crossings=[(0, 1), (1, 2), (2, 3)],
    )  # fmt: skip
    assert [(entry.reads, entry.latents) for entry in staleness(schedule)[4:]] == [(((2, 0),), 3)] * 8


def test_grid_of_two_stages_beside_the_driver() -> None:
    schedule = build_schedule(
        kind="chain", num_stages=2, stride=1, warmup_steps=1, num_steps=2, driver_computes=False
    )
    assert render(schedule) == (
        "               | step 0 in order     | step 1\n"
        "---------------+---------------------+--------------------\n"
        "rank 0 driver  | -                   | -\n"
        "rank 1 stage 0 | C0(x0; t0)          | -\n"
        "rank 2 stage 1 | C1(x0, H0(0); t0)>0 | C1(x1, H0(0); t1)>1\n"
    )


def test_a_long_grid_can_be_cut() -> None:
    schedule = build_schedule(kind="nested", num_stages=3, stride=1, warmup_steps=1, num_steps=50)
    text = render(schedule, max_rounds=3)
    assert text.endswith("... and 47 more rounds\n")
    assert len(text.splitlines()) == 6


@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_main_path_of_a_chain_rests_on_latents_of_one_step_less_than_its_stages_ago(num_stages: int) -> None:
    """docs/method.md, section 1: the main path of eps_s rests on x_{s-N+1}, a skip on x_{s-1}."""
    schedule = build_schedule(
        kind="chain", num_stages=num_stages, stride=1, warmup_steps=1, num_steps=12, forecast="none"
    )
    for entry in staleness(schedule)[num_stages:]:
        assert entry.latents == num_stages - 1
        assert entry.reads == tuple((segment, 1) for segment in range(num_stages - 1))


def test_warmup_is_fresh() -> None:
    schedule = build_schedule(kind="nested", num_stages=3, stride=2, warmup_steps=4, num_steps=9)
    for entry in staleness(schedule)[:4]:
        assert entry.latents == 0
        assert entry.largest_read == 0


def test_deep_path_of_a_nested_split_is_one_step_old() -> None:
    schedule = build_schedule(kind="nested", num_stages=2, stride=1, warmup_steps=1, num_steps=6)
    assert [(entry.largest_read, entry.latents) for entry in staleness(schedule)] == [(0, 0)] + [(1, 1)] * 5


def test_staleness_of_strides_grows_within_a_round() -> None:
    """Round b reads the state labelled b-2 for steps b and b+1, and all its copies start from x_b."""
    schedule = build_schedule(
        kind="chain", num_stages=2, stride=2, warmup_steps=1, num_steps=9, forecast="none"
    )
    assert [entry.reads for entry in staleness(schedule)[3:7]] == [((0, 2),), ((0, 3),), ((0, 2),), ((0, 3),)]
    single = build_schedule(kind="chain", num_stages=1, stride=2, warmup_steps=1, num_steps=5)
    assert [entry.latents for entry in staleness(single)] == [0, 0, 1, 0, 1]
