"""Several denoiser calls per step: every kind of call has states of its own.

Bitwise against the independent model of the method in `method_reference`, one of it for each kind of call.
Kinds are told apart by what the denoiser is conditioned on, so neither by their order nor by a cache
context, which is how the package does it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    StableDiffusion3PAGPipeline,
    StableDiffusionPAGPipeline,
)
from method_reference import Reference, read_in_time
from torch.utils._pytree import tree_flatten

import asyncdiff
from asyncdiff.tiny import TINY_PIPELINES, TinyCall, TinyPipeline, generate

pytestmark = pytest.mark.filterwarnings("ignore::asyncdiff.pipeline.user_warning.AsyncDiffWarning")

CALL = TinyCall(steps=8)
W = 2


def relative(name: str, build: Callable[[Any], Any], **changes: Any) -> TinyPipeline:
    """A family made from the pipeline of another, called with `changes`."""
    family = TINY_PIPELINES[name]
    return replace(
        family,
        build=lambda: quiet(build(family.build())),
        arguments=lambda call: family.arguments(call) | changes,
    )


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def scheduled(noise_scheduler: type) -> Callable[[Any], Any]:
    def build(pipe: Any) -> Any:
        pipe.scheduler = noise_scheduler()
        return pipe

    return build


def perturbed(pipeline: type, noise_scheduler: type | None = None, **how: Any) -> Callable[[Any], Any]:
    def build(pipe: Any) -> Any:
        names = inspect.signature(pipeline.__init__).parameters
        parts = {name: part for name, part in pipe.components.items() if name in names}
        made = pipeline(**parts, **how)
        return scheduled(noise_scheduler)(made) if noise_scheduler else made

    return build


SD_PAG = {"pag_applied_layers": ["mid"], "requires_safety_checker": False}
PAG = {
    "sd PAG": relative("sd15", perturbed(StableDiffusionPAGPipeline, **SD_PAG), pag_scale=3.0),
    "sd PAG KDPM2": relative(
        "sd15", perturbed(StableDiffusionPAGPipeline, KDPM2DiscreteScheduler, **SD_PAG), pag_scale=3.0
    ),
    "sd3 PAG": relative(
        "sd35",
        perturbed(StableDiffusion3PAGPipeline, pag_applied_layers=["blocks.2", "blocks.3"]),
        pag_scale=3.0,
        guidance_scale=1.0,
    ),
}
TWO_CALLS = {
    name: TINY_PIPELINES[name] for name in ("qwen-image", "cogview4", "flux-true-cfg", "chroma", "lumina2")
}
ALIKE = ("qwen-image", "cogview4", "flux-true-cfg", "chroma")  # both calls have the same shapes
SKIPPED_LAYERS = {
    "sd35-skip-layers": TINY_PIPELINES["sd35-skip-layers"],
    "sd35-skip-layers Heun": relative(
        "sd35-skip-layers", scheduled(FlowMatchHeunDiscreteScheduler), skip_layer_guidance_stop=2.0
    ),
    # Guidance by a third call within an interval only.
    "sd35-skip-layers for a while": relative(
        "sd35-skip-layers",
        lambda pipe: pipe,
        skip_layer_guidance_start=0.2,
        skip_layer_guidance_stop=0.8,
    ),
}
SECOND_ORDER = {
    "sd Heun": relative("sd15", scheduled(HeunDiscreteScheduler)),
    "sd KDPM2": relative("sd15", scheduled(KDPM2DiscreteScheduler)),
}


class OwnTimestep(Reference):
    """Conditions every evaluation on the timestep that its call was given, which is all that stride 1 needs:
    each pipeline makes it from the noise scheduler's in its own way."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.given = inspect.signature(self.forward).bind(*args, **kwargs).arguments["timestep"]
        return super().__call__(*args, **kwargs)

    def timestep(self, q: int) -> torch.Tensor:
        return self.given


class CallsByKind:
    """The denoiser's forward: a model of the method for each kind of call. `mixed_up`: at every other step
    each kind gets the states of the next one instead.

    A step with more calls than the one before, or fewer, starts all of them over after it: the package has to
    tell unnamed calls apart by their order, which is in doubt there.
    """

    def __init__(self, pipe: Any, denoiser: Any, stages: list[list[str]], *, mixed_up: bool, **how: Any):
        self.pipe, self.denoiser = pipe, denoiser
        self.make = lambda: OwnTimestep(denoiser, pipe.scheduler, stages, **how)
        self.mixed_up = mixed_up
        self.models: dict[Any, OwnTimestep] = {}
        self.step, self.calls_of_steps = -1, [0]
        self.latents: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = dict(inspect.signature(type(self.denoiser).forward).bind(None, *args, **kwargs).arguments)
        _, latents, *_ = call
        self._count(call[latents])
        kind = fingerprint({name: call[name] for name in call.keys() - {"self", latents, "timestep"}})
        self.models.setdefault(kind, self.make())
        kinds = list(self.models)
        if self.mixed_up:
            kind = kinds[(kinds.index(kind) + self.step) % len(kinds)]
        return self.models[kind](*args, **kwargs)

    def _count(self, latents: torch.Tensor) -> None:
        """Another step has other latents; the calls of one step share them, some twice for guidance."""
        part = latents[-1:]
        if self.latents is None or not torch.equal(self.latents, part):
            self.step += 1
            self.calls_of_steps.append(0)
            self.latents = part.clone()
            counts = self.calls_of_steps
            if len(counts) > 3 and counts[-2] != counts[-3]:
                self.models.clear()
        self.calls_of_steps[-1] += 1


def fingerprint(conditions: dict[str, Any]) -> Any:
    leaves, structure = tree_flatten(sorted(conditions.items()))
    values = tuple(
        leaf.numpy().tobytes() if isinstance(leaf, torch.Tensor) else repr(leaf) for leaf in leaves
    )
    return values, str(structure)


def by_reference(
    family: TinyPipeline, pipe: Any, stages: list[list[str]], *, mixed_up: bool = False, **how: Any
) -> tuple[torch.Tensor, CallsByKind]:
    denoiser = getattr(pipe, family.denoisers[0])
    calls = CallsByKind(pipe, denoiser, stages, mixed_up=mixed_up, **how)
    vars(denoiser)["forward"] = calls
    try:
        return generate(family, pipe, CALL), calls
    finally:
        del vars(denoiser)["forward"]


def parallelized(
    family: TinyPipeline, pipe: Any, num_stages: int, kind: str
) -> tuple[torch.Tensor, list[list[str]], list[tuple[str, int, int]]]:
    options: dict[str, Any] = {"warmup_steps": W, "forecast": "linear"}
    with asyncdiff.parallelize(pipe, num_stages=num_stages, partition=kind, **options) as handle:
        picture = generate(family, pipe, CALL)
        return picture, [list(names) for names in handle.plan.stages], read_in_time(handle.plan)


@pytest.mark.parametrize(("num_stages", "kind"), [(2, "chain"), (3, "chain"), (2, "nested")])
@pytest.mark.parametrize("name", [*TWO_CALLS, *SKIPPED_LAYERS, *SECOND_ORDER])
def test_every_kind_of_call_reads_its_own_states(name: str, num_stages: int, kind: str) -> None:
    family = (TWO_CALLS | SKIPPED_LAYERS | SECOND_ORDER)[name]
    pipe = family.build()
    picture, stages, fresh = parallelized(family, pipe, num_stages, kind)
    expected, calls = by_reference(family, pipe, stages, nested=kind == "nested", w=W, fresh=fresh)
    assert len(calls.models) == family.calls_per_step or "for a while" in name
    assert torch.equal(picture, expected)
    assert not torch.equal(picture, generate(family, pipe, CALL))


@pytest.mark.parametrize("name", ALIKE)
def test_states_of_the_wrong_kind_would_show(name: str) -> None:
    family = TWO_CALLS[name]
    pipe = family.build()
    picture, stages, fresh = parallelized(family, pipe, 2, "chain")
    mixed_up, _ = by_reference(family, pipe, stages, mixed_up=True, w=W, fresh=fresh)
    assert not torch.equal(picture, mixed_up)


@pytest.mark.parametrize("name", PAG)
def test_perturbed_attention_comes_and_goes_from_run_to_run(name: str) -> None:
    """It changes the attention processors for a call of the pipeline; the stages follow."""
    family = PAG[name]
    plain = replace(family, arguments=lambda call: family.arguments(call) | {"pag_scale": 0.0})
    pipe = family.build()
    options: dict[str, Any] = {"warmup_steps": W, "forecast": "linear"}
    with asyncdiff.parallelize(pipe, num_stages=2, partition="chain", **options) as handle:
        pictures = [generate(each, pipe, CALL) for each in (family, plain, family)]
        stages = [list(names) for names in handle.plan.stages]
        fresh = read_in_time(handle.plan)
    expected = [by_reference(each, pipe, stages, w=W, fresh=fresh)[0] for each in (family, plain)]
    assert torch.equal(pictures[0], expected[0])
    assert torch.equal(pictures[1], expected[1])
    assert torch.equal(pictures[2], expected[0])
    assert not torch.equal(expected[0], expected[1])


@pytest.mark.wide
def test_a_process_whose_layers_are_all_skipped_idles() -> None:
    family = SKIPPED_LAYERS["sd35-skip-layers"]
    pipe = family.build()
    blocks = [f"transformer_blocks.{index}" for index in range(len(pipe.transformer.transformer_blocks))]
    around = [["pos_embed", *blocks[:2]], blocks[2:4], [*blocks[4:], "norm_out", "proj_out"]]
    with asyncdiff.parallelize(pipe, num_stages=3, warmup_steps=W, partition=around) as handle:
        expected = generate(family, pipe, CALL)
        plan = handle.plan
    assert [str(name) for name in plan.stages[1]] == blocks[2:4]
    with asyncdiff.parallelize(pipe, ["cpu"] * 3, plan=plan):
        assert torch.equal(generate(family, pipe, CALL), expected)
