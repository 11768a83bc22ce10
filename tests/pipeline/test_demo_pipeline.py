"""The bundled demo pipeline, whose hidden states really are alike from step to step, called with prompts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

import asyncdiff

FOLDER = Path(asyncdiff.__file__).parent / "demo" / "assets" / "shapes-unet"


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(FOLDER, torch_dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe: StableDiffusionPipeline, steps: int = 12) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    prompt = "a red circle on a blue background"
    return pipe(prompt, num_inference_steps=steps, generator=generator, output_type="np").images[0]


def error(a: np.ndarray, b: np.ndarray) -> float:
    return float(((a - b) ** 2).mean() ** 0.5)


def test_in_order_is_untouched_and_remove_restores(pipe: StableDiffusionPipeline) -> None:
    alone = picture(pipe, steps=4)
    with pytest.warns(match="too short"), asyncdiff.parallelize(pipe, num_stages=2, warmup_steps=4):
        assert np.array_equal(picture(pipe, steps=4), alone)
    assert np.array_equal(picture(pipe, steps=4), alone)


def test_forecast_is_nearer_to_the_original_than_the_paper(pipe: StableDiffusionPipeline) -> None:
    alone = picture(pipe)
    errors = {}
    for forecast in ("none", "linear"):
        with asyncdiff.parallelize(pipe, num_stages=2, warmup_steps=2, forecast=forecast):
            errors[forecast] = error(picture(pipe), alone)
    assert 0 < errors["linear"] < errors["none"] < 0.2


def test_plan_needs_no_example_where_there_is_a_tokenizer(
    pipe: StableDiffusionPipeline, capfd: pytest.CaptureFixture[str]
) -> None:
    pipe.set_progress_bar_config(disable=False)
    plan = asyncdiff.plan(pipe, ["cpu", "cpu"], guidance="together")
    pipe.set_progress_bar_config(disable=True)
    assert plan.num_stages == 2
    assert capfd.readouterr().err == ""
