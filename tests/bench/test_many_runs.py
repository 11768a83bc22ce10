"""A divided pipeline does not grow from image to image."""

from __future__ import annotations

import pytest

from asyncdiff.bench.many_runs import VARIATIONS, Held, ManyRuns, run_many

LARGEST_GROWTH = 64 << 10
"""Bytes per image: a state of a tiny pipeline that is kept is more within a few images, the allocator's
wandering is less over sixty of them."""


def test_growth_is_of_the_last_two_looks() -> None:
    held = (Held(2, (100, 50), ()), Held(10, (200, 50), ()), Held(20, (240, 70), ()))
    found = ManyRuns("sd15", "nothing", held)
    assert found.bytes_per_image == (4.0, 2.0)
    assert len(found.rows()) == 4
    assert found.to_json()["bytes_per_image"] == (4.0, 2.0)


@pytest.mark.wide
@pytest.mark.timeout(600)
@pytest.mark.parametrize("vary", VARIATIONS)
def test_no_process_grows_with_the_number_of_images(vary: str) -> None:
    found = run_many("sd15", vary, devices=["cpu", "cpu"], counts=(12, 72), steps=3)
    assert max(found.bytes_per_image) < LARGEST_GROWTH
