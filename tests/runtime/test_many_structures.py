"""What is prepared for a resolution, or for a value that steers the denoiser, is not kept for ever."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from saboteur import Saboteur, order

import asyncdiff
from asyncdiff.errors import WorkerError
from asyncdiff.pipeline import structures
from asyncdiff.runtime.local import LocalExecutor
from asyncdiff.runtime.remote import RemoteExecutor
from asyncdiff.tiny import TINY_PIPELINES, TinyCall, generate

pytestmark = pytest.mark.filterwarnings("ignore::asyncdiff.pipeline.user_warning.AsyncDiffWarning")

FAMILY = TINY_PIPELINES["lumina2"]  # takes the lengths of its sequences from the masks
TOKENS, WIDTH = 6, 8
ALL_MASKS = list(itertools.product((True, False), repeat=TOKENS))[:-1]
LIMIT = 2  # the two calls of a step


def picture(pipe: Any, mask: tuple[bool, ...]) -> torch.Tensor:
    """In two steps of two calls each, the second of a prompt that is always the same."""
    masks = {"prompt_attention_mask": mask, "negative_prompt_attention_mask": ALL_MASKS[0]}
    prompts = torch.randn(2, 1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    return generate(
        FAMILY,
        pipe,
        TinyCall(steps=2),
        prompt_embeds=prompts[0],
        negative_prompt_embeds=prompts[1],
        **{name: torch.tensor([value]) for name, value in masks.items()},
    )


def test_as_many_as_the_limit_says_and_one_that_was_dropped_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(structures, "_MAX_ANALYSES", LIMIT)
    pipe = FAMILY.build()
    masks = [*ALL_MASKS[1:4], ALL_MASKS[1]]
    expected = [picture(pipe, mask) for mask in masks]
    with asyncdiff.parallelize(pipe, num_stages=2, warmup_steps=99) as handle:
        for mask, alone in zip(masks, expected, strict=True):
            assert torch.equal(picture(pipe, mask), alone)
        (divided,) = handle._division.installations
        executor = divided.executor
        assert isinstance(executor, LocalExecutor)
        kept = {analysis.number for analyses in divided.structures.analyses.values() for analysis in analyses}
        assert len(kept) == LIMIT
        assert all(interpreter._wirings.keys() == kept for interpreter in executor._interpreters)
        for replica in executor._replicas.values():
            assert replica._specs.keys() == kept
            assert all(stub.actions.keys() <= kept for stub in replica._stubs.values())


def test_of_many_resolutions_the_latest_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structures, "_MAX_STRUCTURES", LIMIT)
    family = TINY_PIPELINES["sd15"]
    pipe = family.build()
    sizes = [16, 32, 48, 16, 48]
    expected = [generate(family, pipe, height=size, width=size) for size in sizes]
    with asyncdiff.parallelize(pipe, num_stages=2, warmup_steps=99) as handle:
        for size, alone in zip(sizes, expected, strict=True):
            assert torch.equal(generate(family, pipe, height=size, width=size), alone)
        (divided,) = handle._division.installations
        assert isinstance(divided.executor, LocalExecutor)
        kept = {analysis.number for analyses in divided.structures.analyses.values() for analysis in analyses}
        assert kept == {2, 3}, "the fourth is a new one, the fifth was there"
        assert all(replica._specs.keys() == kept for replica in divided.executor._replicas.values())


@pytest.mark.wide
@pytest.mark.timeout(400)  # every mask is analysed
@pytest.mark.usefixtures("spawned")
def test_fifty_masks_in_two_processes(tmp_path: Path) -> None:
    """Later steps look ahead: what is dropped may have been announced."""
    orders = tmp_path / "orders"
    pipe = FAMILY.build()
    pipe.transformer.layers[-1] = Saboteur(pipe.transformer.layers[-1], orders)
    masks = [*ALL_MASKS[1:51], ALL_MASKS[1]]
    with asyncdiff.parallelize(pipe, num_stages=2, partition="chain"):
        expected = [picture(pipe, mask) for mask in masks]
    with asyncdiff.parallelize(pipe, devices=["cpu"] * 2, partition="chain") as handle:
        for mask, latents in zip(masks, expected, strict=True):
            assert torch.equal(picture(pipe, mask), latents)
        (divided,) = handle._division.installations
        executor = divided.executor
        assert isinstance(executor, RemoteExecutor)
        assert executor._interpreter is not None
        assert executor._replica is not None
        for kept in (executor._needed, executor._interpreter._wirings, executor._replica._specs):
            assert len(kept) == structures._MAX_ANALYSES
        order(orders, "tell prepared")
        with pytest.raises(WorkerError, match=rf"rank 1 .*prepared at most {structures._MAX_ANALYSES}\b"):
            picture(pipe, masks[0])
        assert torch.equal(picture(pipe, masks[2]), expected[2])
