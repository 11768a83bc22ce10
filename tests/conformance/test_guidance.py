"""`guidance="split"` with every family of pipelines: bitwise the denoiser on each part of the batch."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import asyncdiff
from asyncdiff.errors import ConfigurationError
from asyncdiff.guidance import PartsMemory, SharedBatch, batch_size, find_shared_batch
from asyncdiff.pipeline.denoiser import replaced_forward
from asyncdiff.tiny import TINY_PIPELINES, TinyCall, generate
from asyncdiff.trace import flatten_inputs
from asyncdiff.weights import dump_skeleton

pytestmark = pytest.mark.filterwarnings("ignore::asyncdiff.pipeline.user_warning.AsyncDiffWarning")

IN_ORDER = 99
UNSHARED = {"z-image", "hidream", "mochi"}
"""One call with a list of samples; with the batch in dim 1; which goes through the samples one by one."""
NOT_GUIDED = {
    "flux", "flux-kontext", "flux-controlnet", "flux2", "hunyuan-video", "unconditional-ddpm",
    "unconditional-ddim", *UNSHARED,
}  # fmt: skip
"""Guidance-distilled or unconditional, or with halves that are not one batch in dim 0."""
DIFFERENCE = 1e-3
"""From the whole batch at once, relative to the largest number of the picture: float32 products of fewer rows
are added up in another order, and decoders and random weights make more of it (7e-4 was the most)."""


@contextmanager
def part_by_part(denoiser: nn.Module) -> Iterator[None]:
    """The untouched forward on each half of the batch."""
    forward, known = type(denoiser).forward, dict[Hashable, SharedBatch | None]()
    skeleton = dump_skeleton(denoiser)

    def run(*args: Any, **kwargs: Any) -> Any:
        inputs = flatten_inputs(forward, args, kwargs)
        if inputs.key() not in known:
            known[inputs.key()] = find_shared_batch(skeleton, inputs, 2, torch.device("cpu"))
        shared = known[inputs.key()]
        if shared is None:
            return forward(denoiser, *args, **kwargs)
        parts = PartsMemory().parts(inputs, shared)
        outputs = [forward(denoiser, **part.rebuild()) for part in parts]
        leaves = tuple(torch.cat([output[i] for output in outputs]) for i in range(len(outputs[0])))
        assert leaves[0].shape[0] == batch_size(inputs)
        return leaves if isinstance(outputs[0], tuple) else type(outputs[0])(*leaves)

    with replaced_forward(denoiser, run):
        yield


@pytest.mark.wide
@pytest.mark.parametrize("name", TINY_PIPELINES)
def test_in_order_is_bitwise_the_untouched_denoiser_on_each_half(name: str) -> None:
    """Of two pictures with guidance: as halves of one call, or as two calls of two pictures each."""
    family = TINY_PIPELINES[name]
    pipe = family.build()
    # What is larger of an unconditional picture is its batch.
    calls = [TinyCall(batch=2), TinyCall(batch=2, seed=1, large=not name.startswith("unconditional"))]
    alone = [generate(family, pipe, call) for call in calls]
    with asyncdiff.parallelize(pipe, num_stages=2, guidance="split", warmup_steps=IN_ORDER) as handle:
        if name in UNSHARED:
            with pytest.raises(ConfigurationError, match="cannot be shared between 2 groups"):
                generate(family, pipe, calls[0])
            return
        made = [generate(family, pipe, call) for call in calls]
        assert all(plan is not None and plan.groups == 2 for plan in handle.plans.values())
    with ExitStack() as stack:
        for each in family.denoisers:
            stack.enter_context(part_by_part(getattr(pipe, each)))
        expected = [generate(family, pipe, call) for call in calls]
    for one, other, whole in zip(made, expected, alone, strict=True):
        assert torch.equal(one, other)
        assert (one - whole).abs().max() <= DIFFERENCE * whole.abs().max()
    assert torch.equal(generate(family, pipe, calls[0]), alone[0])


@pytest.mark.wide
@pytest.mark.parametrize("num_stages", [1, 2])
@pytest.mark.parametrize("name", TINY_PIPELINES)
def test_refreshed_guidance_of_every_family(name: str, num_stages: int) -> None:
    """In order it is the untouched pipeline, bitwise on one device; else near it where something is left out.
    What has no guidance, or none whose halves can be told, is as without it."""
    family = TINY_PIPELINES[name]
    pipe, call = family.build(), TinyCall(steps=8)
    options: dict[str, Any] = {"num_stages": num_stages, "partition": "chain"}
    alone = generate(family, pipe, call)
    with asyncdiff.parallelize(pipe, guidance_refresh=2, warmup_steps=IN_ORDER, **options):
        made = generate(family, pipe, call)
        assert (made - alone).abs().max() <= DIFFERENCE * alone.abs().max()
        assert torch.equal(made, alone) or num_stages > 1
    with asyncdiff.parallelize(pipe, **options):
        every_step = generate(family, pipe, call)
    with asyncdiff.parallelize(pipe, guidance_refresh=2, **options):
        made = generate(family, pipe, call)
        # Z-Image's second run knows the timesteps better, with refresh or without.
        assert torch.equal(generate(family, pipe, call), made) or name == "z-image"
    assert torch.equal(made, every_step) == (name in NOT_GUIDED)
    assert torch.equal(generate(family, pipe, call), alone)


@pytest.mark.wide
@pytest.mark.parametrize(
    ("name", "num_stages"), [("wan-2.2", 1), ("sdxl", 2), ("svd", 1), ("stable-cascade", 1)]
)
def test_groups_of_processes_are_bitwise_the_local_executor(name: str, num_stages: int) -> None:
    """Also with two denoisers, which hand over to each other or follow one another."""
    family = TINY_PIPELINES[name]
    pipe = family.build()
    calls = [TinyCall(batch=2, steps=6), TinyCall(batch=2, steps=6, seed=1, large=True)]
    options = {"num_stages": num_stages, "guidance": "split"}
    with asyncdiff.parallelize(pipe, **options):
        expected = [generate(family, pipe, call) for call in calls]
    with asyncdiff.parallelize(pipe, devices=["cpu"] * (2 * num_stages), **options):
        for call, picture in zip(calls, expected, strict=True):
            assert torch.equal(generate(family, pipe, call), picture)
