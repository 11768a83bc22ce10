"""Real processes compute, bit for bit, what the local executor computes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tiny_pipelines import generate, tiny_pipeline

import asyncdiff

SHAPES = [(2, 1), (3, 1), (2, 2), (1, 2)]
"""(num_stages, stride), for two and for three processes."""


def settings() -> list[Any]:
    every = itertools.product(
        SHAPES, ("chain", "nested"), ("latents", "none"), (torch.float32, torch.bfloat16)
    )
    lines = itertools.product(((3, 1), (2, 2)), ("chain",), ("linear",), (torch.float32,))
    return [
        pytest.param(
            shape, kind, forecast, dtype, id=f"N{shape[0]}-S{shape[1]}-{kind}-{forecast}-{str(dtype)[6:]}"
        )
        for shape, kind, forecast, dtype in (*every, *lines)
        if shape[0] > 1 or kind == "chain"
    ]


@pytest.mark.usefixtures("spawned")
@pytest.mark.parametrize(("shape", "kind", "forecast", "dtype"), settings())
def test_spawned_workers_equal_local_executor(
    shape: tuple[int, int], kind: str, forecast: str, dtype: torch.dtype
) -> None:
    num_stages, stride = shape
    options: dict[str, Any] = {
        "num_stages": num_stages, "stride": stride, "partition": kind, "forecast": forecast,
        "warmup_steps": 2, "time_shift": stride == 2 and forecast == "none",
    }  # fmt: skip
    pipe = tiny_pipeline(dtype=dtype)
    untouched = generate(pipe)
    with asyncdiff.parallelize(pipe, runtime="local", **options):
        expected = generate(pipe, num_steps=7)
    with asyncdiff.parallelize(pipe, devices=["cpu"] * (num_stages + stride - 1), **options) as handle:
        assert torch.equal(generate(pipe, num_steps=7), expected)
        assert torch.equal(generate(pipe, num_steps=7), expected), "the second picture knows of the first"
        handle.set(warmup_steps=5)
        assert torch.equal(generate(pipe), untouched), "in order is not the untouched pipeline"
    assert torch.equal(generate(pipe), untouched)
