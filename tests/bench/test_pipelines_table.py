"""The table of docs/pipelines.md says what the planner chose."""

from __future__ import annotations

from pathlib import Path

import pytest

from asyncdiff.bench.architectures import ARCHITECTURES, architecture_named, build_denoiser
from asyncdiff.bench.pipelines_table import Row, cut_real_size, table

PAGE = Path(__file__).parents[2] / "docs" / "pipelines.md"


@pytest.fixture(scope="module")
def row() -> Row:
    return cut_real_size(architecture_named("demo"))


def test_figures_are_those_of_the_denoiser(row: Row) -> None:
    """In bfloat16: two bytes a parameter, on one device or shared by several that need it."""
    import torch

    denoiser = build_denoiser(row.architecture, torch.float32)
    assert row.parameter_bytes == 2 * denoiser.num_parameters()
    for cut in row.cuts:
        assert len(cut.parameter_bytes) == cut.num_stages
        assert row.parameter_bytes <= sum(cut.parameter_bytes) < 1.1 * row.parameter_bytes
        assert 0 <= cut.imbalance < 0.05
        assert cut.crossing_bytes > 0


def test_table_shows_what_was_found_and_what_the_suite_runs(row: Row) -> None:
    text = table([row], ["demo", "another"])
    shown = next(line for line in text.splitlines() if "the bundled pipeline" in line)
    cells = [cell.strip() for cell in shown.strip("|").split("|")]
    assert cells[1] == "`UNet2DConditionModel`"
    assert cells[5] == " / ".join(str(cut.num_blocks) for cut in row.cuts)
    assert cells[6] == f"{row.cuts[0].crossing_bytes / 1e6:.0f}"
    assert cells[8] == f"{row.cuts[1].crossing_bytes / 1e6:.0f}"
    assert cells[10] == f"{row.largest_imbalance:.1%}"
    assert cells[11] == "`demo`"
    assert "also runs `another`" in text
    assert "no" in table([row], []).splitlines()[2]


def test_page_has_a_row_for_every_architecture() -> None:
    page = PAGE.read_text(encoding="utf-8")
    missing = [each.title for each in ARCHITECTURES.values() if f"\n| {each.title} |" not in page]
    assert not missing, f"run `make tables`: {missing}"
