"""The runtime does what docs/method.md says: bitwise, against an independent implementation in
`method_reference`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import (
    ConfigMixin,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    ModelMixin,
    PNDMScheduler,
)
from diffusers.configuration_utils import register_to_config
from method_reference import Reference, read_in_time
from random_pipelines import denoiser, generate, sd, sd3, sdxl, unet
from torch import nn

import asyncdiff
from asyncdiff.planner import Plan

pytestmark = pytest.mark.filterwarnings("ignore::asyncdiff.pipeline.user_warning.AsyncDiffWarning")

STEPS = 9
DIVISIONS = {
    "whole": [["a", "b", "c", "d"]],
    "chain of 2": [["a", "b"], ["c", "d"]],
    "chain of 3": [["a"], ["b", "c"], ["d"]],
    "nested of 2": [["a", "d"], ["b", "c"]],
    "nested of 3": [["a", "d"], ["b"], ["c"]],
}


class Block(nn.Module):
    """Mixes its inputs with the timestep. Returns a mask too if told so: integers are never forecast."""

    def __init__(self, width: int, inputs: int, masks: bool = False) -> None:
        super().__init__()
        self.mix = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(inputs))
        self.masks = masks

    def forward(self, timestep: torch.Tensor, *hidden: torch.Tensor) -> Any:
        mixed = sum(conv(h) for conv, h in zip(self.mix, hidden, strict=True))
        out = torch.tanh(mixed * (1 + torch.sin(timestep / 300)))
        return (out, (out > 0).long()) if self.masks else out


class Toy(ModelMixin, ConfigMixin):
    """Four blocks in a row with skips over one and two of them; the latents enter in three places."""

    @register_to_config
    def __init__(
        self, in_channels: int = 4, sample_size: int = 8, time_cond_proj_dim: int | None = None
    ) -> None:
        super().__init__()
        self.a, self.b = Block(in_channels, 1, masks=True), Block(in_channels, 2)
        self.c, self.d = Block(in_channels, 2), Block(in_channels, 4)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        **ignored: Any,
    ) -> tuple[torch.Tensor]:
        x = sample + encoder_hidden_states.mean()
        a, mask = self.a(timestep, x)
        b = self.b(timestep, a, x)
        c = self.c(timestep, b, a)
        return (self.d(timestep, c, b * mask, a, sample),)


def toy() -> Toy:
    torch.manual_seed(0)
    return Toy().eval()


def latents_by_reference(
    pipe: Any, stages: list[list[str]], *, steps: int = STEPS, **settings: Any
) -> torch.Tensor:
    module = denoiser(pipe)
    vars(module)["forward"] = Reference(module, pipe.scheduler, stages, **settings)
    try:
        return generate(pipe, steps=steps)
    finally:
        del vars(module)["forward"]


@pytest.mark.parametrize("forecast", ["none", "linear"])
@pytest.mark.parametrize("time_shift", [False, True], ids=["", "time shift"])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("division", DIVISIONS)
def test_toy_follows_the_method(division: str, stride: int, time_shift: bool, forecast: str) -> None:
    """With Euler's noise scheduler, which scales the latents by a factor of the step."""
    stages = DIVISIONS[division]
    pipe = sd(unet=toy(), scheduler=EulerDiscreteScheduler())
    settings = {"S": stride, "time_shift": time_shift, "forecast": forecast == "linear"}
    nested = division.startswith("nested")
    expected = {w: latents_by_reference(pipe, stages, nested=nested, w=w, **settings) for w in (1, 2, 4)}
    with asyncdiff.parallelize(
        pipe,
        num_stages=len(stages),
        stride=stride,
        time_shift=time_shift,
        forecast=forecast,
        freshness="auto" if nested else "paper",  # what is read in time: see below
        partition=stages,
    ) as handle:
        for warmup_steps, latents in expected.items():
            handle.set(warmup_steps=warmup_steps)
            assert torch.equal(generate(pipe, steps=STEPS), latents), f"warmup_steps={warmup_steps}"


def plan_of(pipe: Any, stages: list[list[str]], **options: Any) -> Plan:
    with asyncdiff.parallelize(pipe, num_stages=len(stages), partition=stages, **options) as handle:
        generate(pipe, steps=STEPS)
        assert handle.plan is not None
        return handle.plan


FRESH = {
    "chain of 2": [("a[0]", 1)],
    "chain of 3": [("a[0]", 2), ("a[1]", 2), ("b[0]", 2)],
}


@pytest.mark.parametrize("forecast", ["none", "linear"])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("division", FRESH)
def test_toy_reads_in_time_what_the_plan_lists(division: str, stride: int, forecast: str) -> None:
    """Also leaves of which another stage reads the late version, and integers."""
    stages, fresh = DIVISIONS[division], tuple(FRESH[division])
    pipe = sd(unet=toy(), scheduler=EulerDiscreteScheduler())
    made = plan_of(pipe, stages, stride=stride, forecast=forecast)
    listed = read_in_time(replace(made, fresh=fresh))
    settings = {"S": stride, "forecast": forecast == "linear", "w": 2}
    expected = latents_by_reference(pipe, stages, fresh=listed, **settings)
    late = latents_by_reference(pipe, stages, **settings)
    assert not torch.equal(expected, late)
    for wanted, leaves in ((expected, fresh), (late, ())):
        with asyncdiff.parallelize(pipe, plan=replace(made, fresh=leaves, warmup_steps=2)):
            assert torch.equal(generate(pipe, steps=STEPS), wanted)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("division", FRESH)
def test_damped_forecast_follows_the_method(division: str, stride: int) -> None:
    """Not bitwise: the sums that the damping is made of are added up in another order."""
    stages = DIVISIONS[division]
    pipe = sd(unet=toy(), scheduler=EulerDiscreteScheduler())
    made = plan_of(pipe, stages, stride=stride, forecast="damped")
    plan = replace(made, fresh=tuple(FRESH[division]))
    settings: dict[str, Any] = {"S": stride, "w": 1, "fresh": read_in_time(plan)}
    expected = latents_by_reference(pipe, stages, damped=True, **settings)
    linear = latents_by_reference(pipe, stages, **settings)
    with asyncdiff.parallelize(pipe, plan=plan):
        latents = generate(pipe, steps=STEPS)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
    assert (linear - expected).abs().max() > 1e-2


LEADS = {"chain of 2": (1, 0), "chain of 3": (1, 1, 0), "nested of 3": (0, 0, 0), "whole": (0,)}


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, HeunDiscreteScheduler])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("division", LEADS)
def test_continued_latents_follow_the_method(division: str, stride: int, scheduler: Any) -> None:
    """Not bitwise: the polynomials are summed in another order."""
    stages, nested = DIVISIONS[division], division.startswith("nested")
    pipe = sd(unet=toy(), scheduler=scheduler())
    plan = plan_of(pipe, stages, stride=stride, forecast="latents")
    if division in FRESH:
        plan = replace(plan, fresh=tuple(FRESH[division]))
    settings: dict[str, Any] = {"S": stride, "nested": nested, "fresh": read_in_time(plan)}
    for w in (1, 4):
        expected = latents_by_reference(pipe, stages, w=w, leads=LEADS[division], **settings)
        with asyncdiff.parallelize(pipe, plan=replace(plan, warmup_steps=w)):
            latents = generate(pipe, steps=STEPS)
        torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
    linear = latents_by_reference(pipe, stages, w=4, **settings)
    differs = stride > 1 or not (nested or division == "whole")
    assert ((linear - expected).abs().max() > 1e-2) == differs


REAL = {
    "sd PNDM": lambda: sd(scheduler=PNDMScheduler(skip_prk_steps=True)),
    "sd Euler": lambda: sd(unet=unet(layers_per_block=2), scheduler=EulerDiscreteScheduler()),
    "sdxl DDIM": lambda: sdxl(),
    "sd3 flow matching": lambda: sd3(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0)),
}


@pytest.mark.parametrize(
    ("name", "num_stages", "stride", "kind"),
    [(name, 3, 2, kind) for name in REAL for kind in ("chain", "nested")]
    + [("sd PNDM", 2, 1, "chain"), ("sdxl DDIM", 2, 1, "nested"), ("sd3 flow matching", 4, 1, "chain")],
)
def test_real_denoiser_follows_the_method(name: str, num_stages: int, stride: int, kind: str) -> None:
    pipe = REAL[name]()
    with asyncdiff.parallelize(
        pipe, num_stages=num_stages, stride=stride, warmup_steps=2, partition=kind, forecast="linear"
    ) as handle:
        latents = generate(pipe, steps=STEPS)
        stages = [list(names) for names in handle.plan.stages]
    assert handle.plan.kind == kind
    fresh = read_in_time(handle.plan)
    expected = latents_by_reference(pipe, stages, nested=kind == "nested", S=stride, w=2, fresh=fresh)
    assert torch.equal(latents, expected)
    assert not torch.equal(latents, generate(pipe, steps=STEPS))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("name", "leads"),
    [
        ("sd PNDM", (1, 1, 0)),
        ("sd Euler", (1, 0)),
        ("sdxl DDIM", (1, 1, 0)),
        ("sd3 flow matching", (2, 1, 0)),
    ],
)
def test_real_denoiser_with_continued_latents(name: str, leads: tuple[int, ...], stride: int) -> None:
    """A U-Net has skips past stages; in Stable Diffusion 3 everything goes from stage to stage."""
    pipe = REAL[name]()
    options: dict[str, Any] = {"stride": stride, "warmup_steps": 2, "partition": "chain"}
    with asyncdiff.parallelize(pipe, num_stages=len(leads), forecast="latents", **options) as handle:
        latents = generate(pipe, steps=STEPS)
        stages = [list(names) for names in handle.plan.stages]
    fresh = read_in_time(handle.plan)
    expected = latents_by_reference(pipe, stages, S=stride, w=2, fresh=fresh, leads=leads)
    torch.testing.assert_close(latents, expected, rtol=1e-3, atol=1e-3)
    assert (latents - generate(pipe, steps=STEPS)).abs().max() > 1e-2
