"""The bundled transformer pipeline in stages: in order it is untouched, and `remove()` gives it back."""

import numpy as np
import pytest
import torch

import asyncdiff
from asyncdiff.demo import DEMO_CAPTIONS, DEMO_MODELS, load_demo_pipeline

_MODEL = DEMO_MODELS["transformer"]


@pytest.fixture(scope="module")
def pipe() -> object:
    return load_demo_pipeline(model="transformer")


def _picture(pipe: object, steps: int) -> np.ndarray:
    return pipe(
        DEMO_CAPTIONS[0],
        num_inference_steps=steps,
        guidance_scale=_MODEL.guidance_scale,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        **_MODEL.call_arguments,
    ).images[0]


@pytest.mark.parametrize("num_stages", [2, 4])
def test_in_order_is_untouched_and_remove_restores(pipe: object, num_stages: int) -> None:
    alone = _picture(pipe, steps=4)
    with (
        pytest.warns(match="too short"),
        asyncdiff.parallelize(pipe, num_stages=num_stages, warmup_steps=4),
    ):
        assert np.array_equal(_picture(pipe, steps=4), alone)
    assert np.array_equal(_picture(pipe, steps=4), alone)


def test_asynchronous_pictures_are_near_the_original(pipe: object) -> None:
    alone = _picture(pipe, steps=20)
    with asyncdiff.parallelize(pipe, num_stages=2, warmup_steps=2):
        error = float(((_picture(pipe, steps=20) - alone) ** 2).mean() ** 0.5)
    assert 0 < error < 0.2
