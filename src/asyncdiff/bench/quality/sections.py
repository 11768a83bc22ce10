"""What docs/fidelity.md shows: which models, settings and ways. No torch."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from asyncdiff.bench.configurations import Configuration
from asyncdiff.bench.loading import BUNDLED
from asyncdiff.bench.quality.results import Generation
from asyncdiff.bench.quality.ways import AUTO, PAPER_FORECAST, PAPER_FRESHNESS, WarmupSteps, Way
from asyncdiff.demo import DEMO_MODELS, held_out_captions

MAIN = "steps-50"
AUTO_WARMUP = "auto"
HALF_DTYPES = ("bfloat16", "float16")

CONFIGURATIONS = tuple(Configuration(*pair) for pair in ((2, 1), (3, 1), (4, 1), (2, 2), (3, 2)))
PAPER = (PAPER_FORECAST, PAPER_FRESHNESS)
RULES = (PAPER, ("linear", "paper"), ("linear", "auto"), ("damped", "auto"), ("latents", "auto"))
_SIDE_RULES = (PAPER, ("linear", "auto"), ("latents", "auto"))
_GATED_RULES = (("linear", "auto"), ("damped", "auto"))  # a gate looks at states that are continued

# A chain throughout, so that rows differ in what is read and in nothing else; the planner may choose another.
_PARTITION = "chain"
_OTHER_PARTITION = "nested"
_SIDE_CAPTIONS = 16
_HIGH_GUIDANCE = 7.5
_BATCH_SIZE = 16
REFRESH = "refresh"  # how the names of its sections begin
_REFRESH_CAPTIONS = 24
_REFRESH_STAGES = 2  # at most
_REFRESH_GUIDANCE = (None, _HIGH_GUIDANCE, 12.0)
_REFRESH_STEPS = (50, 20)
WAYS = "ways"  # what docs/choosing.md shows
NUM_DEVICES = (2, 3, 4, 6, 8)
_REFRESHES = (2, 4)
_FLOAT16_CAPTIONS = 8  # a step of 16 takes a processor 1.45 s, and 0.16 in float32


@dataclass(frozen=True)
class Section:
    """Ways that share one set of pictures in order. `name`: the same for the same setting of every model."""

    name: str
    title: str
    generation: Generation
    ways: tuple[Way, ...]

    @property
    def key(self) -> str:
        return f"{self.generation.model}/{self.name}"


def sections(models: tuple[str, ...], num_captions: int) -> Iterator[Section]:
    """All of them; the first of every model before the second of any."""
    captions = tuple(held_out_captions(num_captions))
    of_models = [list(_of_model(model, captions)) for model in models]
    for index in range(max(map(len, of_models))):
        yield from (own[index] for own in of_models if index < len(own))


def _of_model(model: str, captions: tuple[str, ...]) -> Iterator[Section]:
    def section(
        name: str, title: str, warmup: WarmupSteps = 1, partition: str = _PARTITION, **changed: Any
    ) -> Section:
        shown = captions if name == MAIN else captions[:_SIDE_CAPTIONS]
        generation = Generation(model, shown, dtype="float32", batch_size=_BATCH_SIZE)
        rules = _GATED_RULES if warmup == AUTO else RULES if name == MAIN else _SIDE_RULES
        ways = tuple(Way(each, *rule, warmup, partition) for each in CONFIGURATIONS for rule in rules)
        return Section(name, title, replace(generation, **changed), ways)

    yield section(MAIN, "50 steps")
    yield section(_OTHER_PARTITION, "a nested split", partition=_OTHER_PARTITION)
    yield section(AUTO_WARMUP, 'warmup_steps="auto"', AUTO)
    yield section("steps-25", "25 steps", steps=25)
    for name, title, scheduler, options in _samplers(model):
        yield section(name, title, scheduler=scheduler, scheduler_options=options)
    yield section("guidance", f"guidance {_HIGH_GUIDANCE:g}", guidance_scale=_HIGH_GUIDANCE)
    yield section("bfloat16", "bfloat16", dtype="bfloat16")
    yield section("float16", "float16", dtype="float16", captions=captions[:_FLOAT16_CAPTIONS])
    for steps, scale in itertools.product(_REFRESH_STEPS, _REFRESH_GUIDANCE):
        yield _refresh_section(model, captions[:_REFRESH_CAPTIONS], steps, scale)
    ways = tuple(_all_ways())
    generation = Generation(model, captions[:_SIDE_CAPTIONS], dtype="float32", batch_size=_BATCH_SIZE)
    yield Section(WAYS, "every way to use 2 to 8 devices", generation, ways)


def _all_ways() -> Iterator[Way]:
    """Of every stages x stride that some of `NUM_DEVICES` make, in one group or in each of two, what the
    other sections do not have."""
    sizes = {count // groups for count in NUM_DEVICES for groups in (1, 2) if count % groups == 0}
    for size in sorted(sizes):
        by_stride = [Configuration(size - stride + 1, stride) for stride in range(1, size + 1)]
        for configuration in by_stride:
            if size > 1 and configuration not in CONFIGURATIONS:
                yield Way(configuration, "latents", "auto", partition=_PARTITION)
        for refresh in _REFRESHES if size > _REFRESH_STAGES else ():
            yield Way(by_stride[0], "latents", "auto", partition=_PARTITION, guidance_refresh=refresh)


def _refresh_section(
    model: str, captions: tuple[str, ...], steps: int, guidance_scale: float | None
) -> Section:
    """Guidance refreshed every second and fourth step, on one device and in two stages."""
    if guidance_scale is None:
        guidance_scale = DEMO_MODELS[BUNDLED[model]].guidance_scale
        name = f"{REFRESH}-{steps}"
    else:
        name = f"{REFRESH}-{steps}-{guidance_scale:g}"
    one, most = Configuration(1, 1), Configuration(_REFRESH_STAGES, 1)
    ways = tuple(
        Way(configuration, "latents", "auto", partition=_PARTITION, guidance_refresh=refresh)
        for configuration, refreshes in ((one, _REFRESHES), (most, (1, *_REFRESHES)))
        for refresh in refreshes
    )
    generation = Generation(
        model, captions, steps=steps, guidance_scale=guidance_scale, dtype="float32", batch_size=_BATCH_SIZE
    )
    return Section(name, f"{steps} steps, guidance {guidance_scale:g}", generation, ways)


def _samplers(model: str) -> list[tuple[str, str, str, tuple[tuple[str, Any], ...]]]:
    """(name, title, class, options) of noise schedulers other than the model's own."""
    folder = DEMO_MODELS[BUNDLED[model]].folder
    own = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    solver = "DPMSolverMultistepScheduler"
    if own["_class_name"].startswith("FlowMatch"):  # its own is Euler's method
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": own["shift"]}
        return [
            ("dpm", "DPM-Solver++ (flow sigmas)", solver, tuple(flow.items())),
            ("heun", "Heun (flow matching)", "FlowMatchHeunDiscreteScheduler", ()),
        ]
    return [("euler", "Euler", "EulerDiscreteScheduler", ()), ("dpm", "DPM-Solver++", solver, ())]
