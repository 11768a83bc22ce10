"""What is measured of the bundled model: exact where it must be, and not where it cannot be."""

from __future__ import annotations

import csv
import json
import math
import statistics
from html import escape
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from asyncdiff.bench.configurations import Configuration
from asyncdiff.bench.pictures import psnr_db
from asyncdiff.bench.quality.measure import measure_quality
from asyncdiff.bench.quality.page import page
from asyncdiff.bench.quality.results import Generation, QualityResult
from asyncdiff.bench.quality.tables import facts, steps_in_order_text, tables, write_csv
from asyncdiff.bench.quality.ways import Way
from asyncdiff.demo import GUIDANCE_SCALE, held_out_captions, load_demo_pipeline
from asyncdiff.errors import ConfigurationError
from asyncdiff.pipeline import parallelize

STEPS = 7
CAPTIONS = tuple(held_out_captions(4))  # two batches of one size are looked at once
GENERATION = Generation("demo", CAPTIONS, seed=5, steps=STEPS, batch_size=2)
WAYS = tuple(
    Way(Configuration(*pair), forecast, "paper", warmup)
    for pair, forecast, warmup in (
        ((2, 1), "none", 1),
        ((2, 1), "linear", 3),
        ((2, 2), "linear", 1),
        ((2, 1), "linear", STEPS),
    )
)

pytestmark = pytest.mark.filterwarnings("ignore::asyncdiff.pipeline.user_warning.AsyncDiffWarning")


@pytest.fixture(scope="module")
def result() -> QualityResult:
    torch.set_num_threads(1)
    return measure_quality(GENERATION, WAYS)


def test_figures_are_those_of_pictures_made_by_hand(result: QualityResult) -> None:
    pipe = load_demo_pipeline()

    def generate(start: int, kind: str) -> Any:
        texts = CAPTIONS[start : start + 2]
        return pipe(
            list(texts),
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE_SCALE,
            generator=[torch.Generator().manual_seed(5 + start + i) for i in range(len(texts))],
            output_type=kind,
        ).images

    def everything() -> tuple[list[Image.Image], torch.Tensor]:
        return generate(0, "pil") + generate(2, "pil"), generate(2, "latent")

    found = result.ways[0]
    alone, alone_latents = everything()
    with parallelize(pipe, **found.way.settings):
        stale, stale_latents = everything()
    psnrs = [psnr_db(*pair) for pair in zip(alone, stale, strict=True)]
    assert found.psnr_db == pytest.approx(psnrs)
    assert found.psnr_mean_db == pytest.approx(statistics.fmean(psnrs))
    assert found.psnr_worst_tenth_db == found.psnr_lowest_db == pytest.approx(min(psnrs))
    error = (stale_latents[0] - alone_latents[0]).norm() / alone_latents[0].norm()
    assert found.latents_error is not None
    assert found.latents_error[2] == pytest.approx(error.item(), rel=1e-4)


def test_run_in_order_is_without_any_error(result: QualityResult) -> None:
    in_order = result.ways[-1]
    assert in_order.way.warmup_steps == STEPS
    assert in_order.psnr_db == (math.inf,) * len(CAPTIONS)
    assert in_order.num_identical == len(CAPTIONS)
    assert in_order.prediction_errors == (0.0,) * STEPS
    assert in_order.latents_error == (0.0,) * len(CAPTIONS)
    assert in_order.ssim == pytest.approx([1.0] * len(CAPTIONS), abs=1e-5)
    assert in_order.steps_in_order == (tuple(range(STEPS)),) * 2


def test_error_by_step_is_zero_in_warmup_and_not_after(result: QualityResult) -> None:
    for quality in result.ways[:-1]:
        warmup = quality.way.warmup_steps
        assert isinstance(warmup, int)
        assert quality.prediction_errors[:warmup] == (0.0,) * warmup
        assert all(error > 0 for error in quality.prediction_errors[warmup:])
        assert len(quality.prediction_errors) == STEPS
        assert all(len(steps) == warmup for steps in quality.steps_in_order)


def test_automatic_warmup_tells_which_steps_ran_in_order() -> None:
    way = Way(Configuration(2, 1), "damped", "auto", "auto")
    (found,) = measure_quality(GENERATION, [way]).ways
    for steps in found.steps_in_order:
        assert steps[0] == 0
        assert 1 <= len(steps) <= STEPS
    assert found.prediction_errors[0] == 0.0
    counts = sorted({len(steps) for steps in found.steps_in_order})
    text = f"auto ({counts[0]})" if len(counts) == 1 else f"auto ({counts[0]}-{counts[-1]})"
    assert steps_in_order_text(found) == text
    assert found.speed is not None
    assert 0.5 < found.speed.speedup < 2.0


def test_speed_is_simulated_for_as_many_devices(result: QualityResult) -> None:
    by_way = {(str(each.way.configuration), each.way.warmup_steps): each for each in result.ways}
    assert {each.num_devices for each in result.ways} == {2, 3}
    speeds = {key: each.speed.speedup for key, each in by_way.items() if each.speed is not None}
    assert len(speeds) == len(WAYS)
    assert all(each.speed is not None and each.speed.source == "simulated" for each in result.ways)
    # Steps in order take as long as on one device, and an exchange a little longer.
    assert 0.5 < speeds["2x1", STEPS] <= 1.0
    assert speeds["2x1", STEPS] < speeds["2x1", 3] < speeds["2x1", 1] < 2.0


def test_json_csv_and_page_hold_the_same_figures(result: QualityResult, tmp_path: Path) -> None:
    written = json.loads(json.dumps(result.to_json(), allow_nan=False))
    write_csv(result, tmp_path / "q.csv")
    rows = list(csv.DictReader((tmp_path / "q.csv").open()))
    assert [row["configuration"] for row in rows] == ["in order", "2x1", "2x1", "2x2", "2x1"]
    for row, values, quality in zip(rows[1:], written["ways"], result.ways, strict=True):
        assert values["way"]["forecast"] == row["forecast"] == quality.way.forecast
        for name, value in quality.summary().items():
            assert row[name] == ("" if value is None else str(value))
            finite = value is None or math.isfinite(value)
            assert values["summary"][name] == (value if finite else None)
        assert values["psnr_db"] == [each if math.isfinite(each) else None for each in quality.psnr_db]
        assert values["prediction_errors"] == list(quality.prediction_errors)
    text = page(result)
    cells = [cell for table in tables(result) for row in (table.heads, *table.rows) for cell in row if cell]
    texts = [*cells, *(each for pair in facts(result) for each in pair)]
    assert len(cells) > 50
    assert all(f">{escape(each)}<" in text for each in texts)
    shown = tables(result)[0].rows
    for row, quality in zip(shown, result.ways, strict=True):
        psnr = quality.psnr_mean_db
        assert row[6] == ("identical" if math.isinf(psnr) else f"{psnr:.1f} dB")
    assert text.count("data:image/svg+xml;base64,") == 2
    assert text.count("data:image/png;base64,") == 1
    assert "http" not in text


def test_grid_has_a_row_of_pictures_and_differences_for_each_way(result: QualityResult) -> None:
    width, height = result.grid.size
    assert width > 2 * len(CAPTIONS) * 192
    assert height > (1 + len(WAYS)) * 192


def test_table_says_what_is_missing_and_how_many_scales(result: QualityResult) -> None:
    table = tables(result)[0]
    assert "MS-SSIM (3 of 5 scales)" in table.heads
    assert table.heads[5] == "speed-up, simulated"
    assert table.rows[0][-1] in ("no torchvision", "no --lpips-weights")
    assert result.picture_size == (64, 64)


def test_refused_way_is_left_out_with_the_reason() -> None:
    too_many = Way(Configuration(2, STEPS + 1), "linear", "paper")
    generation = Generation("demo", CAPTIONS[:1], steps=STEPS)
    found = measure_quality(generation, [too_many, WAYS[0]])
    assert [each.way for each in found.ways] == [WAYS[0]]
    assert [each.name for each in found.skipped] == [str(too_many)]
    assert f"stride={STEPS + 1} is longer than the run" in found.skipped[0].reason
    with pytest.raises(ConfigurationError, match="refuses every configuration"):
        measure_quality(generation, [too_many])


def test_other_sampler_and_its_refusal() -> None:
    generation = Generation("demo", CAPTIONS[:1], steps=4, scheduler="EulerDiscreteScheduler")
    found = measure_quality(generation, WAYS[:1])
    assert found.scheduler == "EulerDiscreteScheduler"
    with pytest.raises(ConfigurationError, match="--scheduler UNet2DConditionModel"):
        measure_quality(Generation("demo", CAPTIONS, scheduler="UNet2DConditionModel"), WAYS)


@pytest.mark.wide
def test_on_devices_pictures_are_the_same_and_speed_is_measured() -> None:
    generation = Generation("demo", CAPTIONS[:2], seed=5, steps=STEPS)
    simulated = measure_quality(generation, WAYS[:1])
    measured = measure_quality(generation, WAYS[:1], ("cpu", "cpu"), simulated=False)
    # Bitwise at equal threads, which are the cores' share here.
    assert measured.ways[0].psnr_db == pytest.approx(simulated.ways[0].psnr_db, rel=0.01)
    assert measured.ways[0].prediction_errors == pytest.approx(simulated.ways[0].prediction_errors, rel=0.01)
    assert measured.ways[0].speed is not None
    assert measured.ways[0].speed.source == "measured"
    assert tables(measured)[0].heads[5] == "speed-up, measured"
