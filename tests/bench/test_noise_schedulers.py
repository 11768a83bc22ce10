"""docs/noise-schedulers.md says what was found, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from asyncdiff.bench.noise_schedulers import find_support, quality_table, support_table
from asyncdiff.bench.readme import replace_measured
from asyncdiff.tiny.noise_schedulers import SCHEDULER_CASES, SchedulerCase

PAGE = Path(__file__).parents[2] / "docs" / "noise-schedulers.md"

pytestmark = pytest.mark.filterwarnings("ignore::asyncdiff.pipeline.user_warning.AsyncDiffWarning")


def test_row_of_the_page_is_what_is_found_now() -> None:
    cases = [case for case in SCHEDULER_CASES if case.scheduler == "EDMEulerScheduler"]
    header, _, row = support_table(find_support(case) for case in cases).splitlines()
    page = PAGE.read_text().splitlines()
    assert header in page
    assert row in page


def test_every_case_is_on_the_page() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    for case in SCHEDULER_CASES:
        assert any(
            line.startswith(f"| `{case.scheduler}` | {case.family} |") and case.variant in line
            for line in rows
        ), case.name


def test_refusal_stands_in_the_table() -> None:
    found = find_support(SchedulerCase("EulerDiscreteScheduler"), strides=(1, 7))
    assert found.by_stride[0] == "yes"
    assert found.by_stride[1].startswith("refused: stride=7 is longer than the run of 6 steps")
    assert found.by_stride[1] in support_table([found])


def test_tables_of_a_page_are_filled_by_name() -> None:
    page = PAGE.read_text()
    filled = replace_measured(page, "| new |", "support")
    assert filled.count("| new |") == 1
    assert filled.partition("<!-- measured quality")[2] == page.partition("<!-- measured quality")[2]


def test_quality_table_is_that_of_the_figures() -> None:
    result = {"scheduler": "DDIMScheduler", "options": {}, "evaluations": 50, "num_stages": 2}
    results = [
        {**result, "steps": steps, "stride": stride, "psnr_db": 40.04 + stride, "psnr_lowest_db": 30.0}
        for steps in (50, 25)
        for stride in (1, 2)
    ]
    environment = {"packages": {"torch": "2", "diffusers": "0"}}
    table = quality_table({"results": results, "environment": environment, "command": "as it was"})
    assert "| `DDIMScheduler` | 41.0 (30.0) | 42.0 (30.0) | 41.0 (30.0) | 42.0 (30.0) |" in table
    assert "as it was" in table
