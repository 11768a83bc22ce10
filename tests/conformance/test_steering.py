"""Inputs whose values steer the denoiser: another value with the same shapes is analysed anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import asyncdiff
from asyncdiff.tiny import TINY_PIPELINES, TinyCall, generate

pytestmark = pytest.mark.filterwarnings("ignore::asyncdiff.pipeline.user_warning.AsyncDiffWarning")

FAMILY = TINY_PIPELINES["lumina2"]  # takes the lengths of its sequences from the masks
CALL = TinyCall(steps=6)


def masks(length: int, negative_length: int) -> dict[str, Any]:
    """What says how much of the prompts, which are five tokens long, is padding."""
    lengths = {"prompt_attention_mask": length, "negative_prompt_attention_mask": negative_length}
    return {name: torch.arange(5)[None] < length for name, length in lengths.items()}


# Both longer, one shorter, and exchanged: the calls of a step swap their structures.
CHANGES = [masks(5, 3), masks(5, 5), masks(2, 3), masks(3, 5)]


@pytest.mark.parametrize(
    "devices",
    [None, pytest.param(["cpu"] * 3, marks=pytest.mark.wide)],  # what crosses has another size
    ids=["one process", "three processes"],
)
def test_other_masks_of_the_same_shapes_give_the_right_picture(devices: list[str] | None) -> None:
    pipe = FAMILY.build()
    alone = [generate(FAMILY, pipe, CALL, **change) for change in CHANGES]
    assert not any(torch.equal(alone[0], picture) for picture in alone[1:])
    with asyncdiff.parallelize(pipe, devices, num_stages=3, warmup_steps=99):
        for _ in range(2):
            for change, expected in zip(CHANGES, alone, strict=True):
                assert torch.equal(generate(FAMILY, pipe, CALL, **change), expected)


def test_stale_states_are_those_of_a_pipeline_that_never_saw_another_mask() -> None:
    pipe = FAMILY.build()
    with asyncdiff.parallelize(pipe, num_stages=2) as handle:
        generate(FAMILY, pipe, CALL)
        plan = handle.plan
    expected = []
    for change in CHANGES:
        with asyncdiff.parallelize(pipe, plan=plan):
            expected.append(generate(FAMILY, pipe, CALL, **change))
    with asyncdiff.parallelize(pipe, plan=plan):
        for change, picture in zip(CHANGES, expected, strict=True):
            assert torch.equal(generate(FAMILY, pipe, CALL, **change), picture)


def test_masks_seen_before_are_not_analysed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from asyncdiff.pipeline import structures

    recorded = []
    record_call = structures.record_call
    monkeypatch.setattr(
        structures, "record_call", lambda *args, **how: recorded.append(1) or record_call(*args, **how)
    )
    pipe = FAMILY.build()
    with asyncdiff.parallelize(pipe, num_stages=2):
        for _ in range(2):
            for change in CHANGES:
                generate(FAMILY, pipe, CALL, **change)
    assert len(recorded) == len({(2,), (3,), (5,)})  # prompts of so many tokens, positive or negative
