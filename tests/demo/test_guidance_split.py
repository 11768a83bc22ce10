"""Guidance shared between two groups draws the bundled pipelines' own pictures, but for the last bits."""

import numpy as np
import pytest
import torch

import asyncdiff
from asyncdiff.demo import DEMO_CAPTIONS, DEMO_MODELS, load_demo_pipeline

LEAST_DB = 60.0
STEPS = 20


@pytest.mark.parametrize("model", DEMO_MODELS)
def test_split_guidance_draws_the_same_pictures(model: str) -> None:
    pipe = load_demo_pipeline(model=model)
    alone = _pictures(pipe, model)
    with asyncdiff.parallelize(pipe, num_stages=1, guidance="split") as handle:
        split = _pictures(pipe, model)
        assert handle.plan.groups == 2
    for original, other in zip(alone, split, strict=True):
        assert -10 * np.log10(np.mean((original - other) ** 2) + 1e-30) > LEAST_DB


def _pictures(pipe: object, model: str) -> np.ndarray:
    demo = DEMO_MODELS[model]
    pictures: np.ndarray = pipe(
        list(DEMO_CAPTIONS[:2]),
        num_inference_steps=STEPS,
        guidance_scale=demo.guidance_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in range(2)],
        output_type="np",
        **demo.call_arguments,
    ).images
    return pictures.astype(np.float64)
