"""`guidance_refresh=k`: one half of guidance is left out in all but every k-th step, and continued."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionInstructPix2PixPipeline
from method_reference import Reference, Refreshed, read_in_time
from PIL import Image
from random_pipelines import denoiser, generate, prompt, sd, sd3, sdxl

import asyncdiff
from asyncdiff.errors import ConfigurationError
from asyncdiff.pipeline.denoiser import replaced_forward
from asyncdiff.pipeline.user_warning import AsyncDiffWarning
from asyncdiff.planner import Plan
from asyncdiff.runtime.interpreter import StageInterpreter
from asyncdiff.tiny import TINY_PIPELINES, TinyCall
from asyncdiff.tiny import generate as generate_tiny
from asyncdiff.tiny.stable_diffusion import unet

pytestmark = pytest.mark.filterwarnings("ignore:.*too short:asyncdiff.pipeline.user_warning.AsyncDiffWarning")

STEPS = 11
IN_ORDER = 99
ONE_OR_TWO = [pytest.param(1, marks=pytest.mark.wide), 2]
DEVICES = [pytest.param({"devices": 1}, marks=pytest.mark.wide), {"num_stages": 2, "partition": "chain"}]
SAME_HALVES = 2e-5
"""Relative to the largest number of a picture: products of half as many rows may be added up in another
order (`test_split.py`)."""

PIPELINES: dict[str, Callable[[], Any]] = {
    "sd": sd,
    "sdxl": sdxl,
    "sd3": sd3,
    "sd Euler": lambda: sd(scheduler=EulerDiscreteScheduler()),
}


def by_reference(pipe: Any, k: int, w: int = 1, both: Any = None, **call: Any) -> torch.Tensor:
    module = denoiser(pipe)
    forward = type(module).forward.__get__(module)
    with replaced_forward(module, Refreshed(both or [forward], k, w)):
        return generate(pipe, **({"steps": STEPS} | call))


def refreshed(pipe: Any, k: int, steps: int = STEPS, **options: Any) -> torch.Tensor:
    with asyncdiff.parallelize(pipe, runtime="local", guidance_refresh=k, **options):
        return generate(pipe, steps=steps)


# -- one device ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "k"),
    [
        ("sd Euler", 2),
        *(pytest.param(name, 4, marks=pytest.mark.wide) for name in ("sd", "sdxl", "sd3")),
    ],
)
def test_one_device_follows_the_method(name: str, k: int) -> None:
    """Not bitwise: the polynomials are summed in another order."""
    pipe = PIPELINES[name]()
    alone = generate(pipe, steps=STEPS)
    for w in (1, 3):
        expected = by_reference(pipe, k, w)
        made = refreshed(pipe, k, devices=1, warmup_steps=w)
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)
        assert (alone - made).abs().max() > 1e-3
    assert torch.equal(generate(pipe, steps=STEPS), alone)


def test_steps_between_evaluate_half_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, sizes = sd(), list[int]()

    def size_of(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(interpreter: Any, task: Any) -> None:
            sizes.append(len(task.tensors["sample"]))
            forward(interpreter, task)

        return run

    monkeypatch.setattr(StageInterpreter, "compute", size_of(StageInterpreter.compute))
    with asyncdiff.parallelize(pipe, devices=1, guidance_refresh=3, warmup_steps=2) as handle:
        generate(pipe, steps=9, batch=2)
        assert sizes == [4, 4, 2, 2, 4, 2, 2, 4, 2]
        assert handle.plan is not None
        assert handle.plan.guidance_refresh == 3
        assert "guidance refreshed every 3 steps" in handle.plan.describe()


@pytest.mark.parametrize("name", ["sd", pytest.param("sd3", marks=pytest.mark.wide)])
def test_in_order_one_device_is_bitwise_the_untouched_pipeline(name: str) -> None:
    pipe = PIPELINES[name]()
    assert torch.equal(refreshed(pipe, 2, devices=1, warmup_steps=IN_ORDER), generate(pipe, steps=STEPS))


# -- stages --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "leads", "k"),
    [
        ("sdxl", (1, 1, 0), 4),
        *(
            pytest.param(name, leads, k, marks=pytest.mark.wide)
            for name, leads in {"sd Euler": (1, 0), "sdxl": (1, 1, 0), "sd3": (2, 1, 0)}.items()
            for k in (2, 3, 4)
        ),
    ],
)
def test_the_wave_follows_the_method(name: str, leads: tuple[int, ...], k: int) -> None:
    """Against two models of the method, one for each half: all stages of the first one work as far ahead as
    their output is on its way."""
    pipe = PIPELINES[name]()
    N = len(leads)
    for w in (1, 3):
        with asyncdiff.parallelize(
            pipe, num_stages=N, partition="chain", guidance_refresh=k, warmup_steps=w
        ) as handle:
            made = generate(pipe, steps=STEPS)
            plan = handle.plan
        assert plan is not None
        stages, fresh = [list(names) for names in plan.stages], read_in_time(plan)
        every, left_out = (
            Reference(denoiser(pipe), pipe.scheduler, stages, w=w, fresh=fresh, leads=each)
            for each in (leads, range(N - 1, -1, -1))
        )
        expected = by_reference(pipe, k, w, both=[left_out, every])
        torch.testing.assert_close(made, expected, rtol=2e-4, atol=2e-4)
    every_step = refreshed(pipe, 1, num_stages=N, partition="chain", warmup_steps=w)
    assert (made - every_step).abs().max() > 1e-3


@pytest.mark.parametrize("num_stages", [2, pytest.param(3, marks=pytest.mark.wide)])
def test_in_order_stages_are_the_denoiser_on_each_half(num_stages: int) -> None:
    pipe = sd()
    alone = generate(pipe, steps=STEPS)
    made = refreshed(pipe, 2, num_stages=num_stages, warmup_steps=IN_ORDER)
    assert (made - alone).abs().max() <= SAME_HALVES * alone.abs().max()


def test_each_stage_evaluates_the_left_out_half_once_per_refresh() -> None:
    k, w, steps = 4, 1, 14
    pipe = sd()
    with asyncdiff.parallelize(
        pipe, num_stages=2, partition="chain", guidance_refresh=k, warmup_steps=w
    ) as handle:
        generate(pipe, steps=steps)
        spans = [span for span in handle.last_run.timeline.spans if span.category == "compute"]
    for rank, ahead in ((0, 1), (1, 0)):
        own = [step for step in range(steps) if step + ahead < steps or step < w]  # none beyond the end
        refreshes = [step for step in range(steps) if step < w or (step + ahead - w + 1) % k == 0]
        refreshes = [step for step in refreshes if step in own]
        assert len([span for span in spans if span.rank == rank]) == len(own) + len(refreshes)


# -- what guidance is ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", DEVICES)
@pytest.mark.parametrize("is_same", [pytest.param(False, marks=pytest.mark.wide), True])
def test_two_pictures_without_guidance_are_no_halves(options: dict[str, Any], is_same: bool) -> None:
    """Nor where nobody says that there is no guidance: with the same noise and other prompts latents differ
    from the second step on."""

    class Silent(type(sd())):  # type: ignore[misc]
        do_classifier_free_guidance = property(lambda self: SILENT["says"])

    SILENT: dict[str, Any] = {"says": False}
    pipe = sd(Silent)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    latents = torch.cat([noise, noise if is_same else -noise])
    embeddings = prompt(pipe, batch=2)["prompt_embeds"]
    call: dict[str, Any] = {
        "guidance": 1.0, "latents": latents, "prompt_embeds": embeddings, "negative_prompt_embeds": None,
        "steps": STEPS,
    }  # fmt: skip
    with asyncdiff.parallelize(pipe, runtime="local", **options):
        expected = generate(pipe, **call)
    with (
        asyncdiff.parallelize(pipe, runtime="local", guidance_refresh=2, **options),
        pytest.warns(AsyncDiffWarning, match="guidance_refresh=2 changes nothing .*guidance is off"),
    ):
        assert torch.equal(generate(pipe, **call), expected)


@pytest.mark.parametrize("num_stages", ONE_OR_TWO)
def test_halves_that_turn_out_to_be_two_pictures_are_evaluated(num_stages: int) -> None:
    """Of a denoiser in a pipeline that says nothing of guidance."""
    pipe = sd()
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)).expand(2, -1, -1, -1)
    embeddings = prompt(pipe, batch=2)["prompt_embeds"]

    class Loop:
        def __init__(self) -> None:
            self.unet, self.scheduler = pipe.unet, pipe.scheduler

        def run(self) -> torch.Tensor:
            self.scheduler.set_timesteps(STEPS)
            latents = noise
            for t in self.scheduler.timesteps:
                made = self.unet(latents, t, encoder_hidden_states=embeddings, return_dict=False)[0]
                latents = self.scheduler.step(made, t, latents, return_dict=False)[0]
            return latents

    with torch.no_grad():
        alone = Loop().run()
        with asyncdiff.parallelize(pipe, num_stages=num_stages, guidance_refresh=2, warmup_steps=IN_ORDER):
            made = Loop().run()
            assert torch.equal(made, alone) == (num_stages == 1)
            assert (made - alone).abs().max() <= SAME_HALVES * alone.abs().max()
        if num_stages == 1:
            with asyncdiff.parallelize(pipe, num_stages=1, guidance_refresh=2):
                assert torch.equal(Loop().run(), alone)


@pytest.mark.parametrize("options", DEVICES)
def test_three_way_guidance_is_left_as_it_is(options: dict[str, Any]) -> None:
    pipe = sd(StableDiffusionInstructPix2PixPipeline, unet=unet(in_channels=8))
    generator = torch.Generator()
    embeddings = torch.randn(1, 5, 8, generator=generator.manual_seed(0))

    def make() -> torch.Tensor:
        return pipe(
            image=Image.new("RGB", (16, 16), (200, 30, 90)), num_inference_steps=STEPS, output_type="latent",
            prompt_embeds=embeddings, negative_prompt_embeds=-embeddings, generator=generator.manual_seed(1),
        ).images  # fmt: skip

    with asyncdiff.parallelize(pipe, runtime="local", **options):
        expected = make()
    with asyncdiff.parallelize(pipe, runtime="local", guidance_refresh=2, **options):
        with pytest.warns(AsyncDiffWarning, match="changes nothing .*batch of 3"):
            assert torch.equal(make(), expected)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(make(), expected)


def test_nothing_is_left_out_where_timesteps_cannot_be_foreseen() -> None:
    pipe = sd()

    def make(**options: Any) -> torch.Tensor:
        with asyncdiff.parallelize(pipe, num_stages=2, partition="chain", **options):
            divided = pipe.unet.forward
            stretched = lambda x, t, *args, **kwargs: divided(x, t * 1.25, *args, **kwargs)  # noqa: E731
            with replaced_forward(pipe.unet, stretched):
                return generate(pipe, steps=STEPS)

    expected = make()
    with pytest.warns(AsyncDiffWarning, match="changes nothing .*timesteps to come are not known"):
        assert torch.equal(make(guidance_refresh=2), expected)


# -- guidance that comes and goes ----------------------------------------------------------------------------


def stop_guidance(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """As diffusers' documentation does it: half the batch from then on."""
    if step != 4:
        return {}
    pipe._guidance_scale = 0.0
    return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[-1]}


@pytest.mark.parametrize("num_stages", ONE_OR_TWO)
def test_guidance_may_end_in_the_middle_of_a_run(num_stages: int) -> None:
    pipe = sd()
    arguments: dict[str, Any] = {
        "callback_on_step_end": stop_guidance, "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
        "steps": STEPS,
    }  # fmt: skip
    options: dict[str, Any] = {"num_stages": num_stages, "guidance_refresh": 2}
    alone = generate(pipe, **arguments)
    with asyncdiff.parallelize(pipe, warmup_steps=IN_ORDER, **options):
        made = generate(pipe, **arguments)
        assert torch.equal(made, alone) == (num_stages == 1)
        assert (made - alone).abs().max() <= SAME_HALVES * alone.abs().max()
    with asyncdiff.parallelize(pipe, partition="chain", **options) as handle:
        generate(pipe, **arguments)
        assert handle.last_run.steps_in_order == (0, 5), "warm-up again"


@pytest.mark.parametrize("num_stages", ONE_OR_TWO)
def test_guidance_may_pause(num_stages: int) -> None:
    """What was known of the difference before is not used after it."""
    pipe = sd()
    untouched = pipe.unet.forward

    def pausing(forward: Callable[..., Any]) -> Callable[..., Any]:
        """The pipeline without guidance in steps 4 and 5."""
        calls = 0

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls not in (5, 6):
                return forward(*args, **kwargs)
            last = {"encoder_hidden_states": kwargs.pop("encoder_hidden_states")[1:], **kwargs}
            return tuple(torch.cat([each] * 2) for each in untouched_half(args[0][1:], *args[1:], **last))

        untouched_half = forward
        return run

    def make(forward: Callable[..., Any]) -> torch.Tensor:
        with replaced_forward(pipe.unet, pausing(forward)):
            return generate(pipe, steps=STEPS)

    alone = make(untouched)
    options: dict[str, Any] = {"num_stages": num_stages, "guidance_refresh": 2}
    with asyncdiff.parallelize(pipe, partition="chain", **options) as handle:
        assert not torch.equal(make(pipe.unet.forward), alone)
        assert handle.last_run.steps_in_order == (0, 4, 6)
    with asyncdiff.parallelize(pipe, warmup_steps=IN_ORDER, **options):
        assert (make(pipe.unet.forward) - alone).abs().max() <= SAME_HALVES * alone.abs().max()


@pytest.mark.parametrize("num_stages", ONE_OR_TWO)
def test_the_denoiser_may_change_in_the_middle_of_a_run(num_stages: int) -> None:
    """States of before are not those of the changed one: warm-up again."""
    pipe = sd()

    def make() -> torch.Tensor:
        def change(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if step == 4:
                pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
            return {}

        made = generate(pipe, steps=STEPS, callback_on_step_end=change)
        pipe.disable_freeu()
        return made

    alone = make()
    options: dict[str, Any] = {"num_stages": num_stages, "guidance_refresh": 2, "partition": "chain"}
    with asyncdiff.parallelize(pipe, warmup_steps=IN_ORDER, **options):
        assert (make() - alone).abs().max() <= SAME_HALVES * alone.abs().max()
    with asyncdiff.parallelize(pipe, **options) as handle:
        assert not torch.equal(make(), alone)
        assert handle.last_run.steps_in_order == ((0,) if num_stages == 1 else (0, 5))


@pytest.mark.parametrize("options", DEVICES)
def test_runs_of_other_sizes_and_batches_follow_one_another(options: dict[str, Any]) -> None:
    pipe = sd()
    calls: list[dict[str, Any]] = [{}, {"size": 16}, {"num_images_per_prompt": 2}, {}]
    alone = generate(pipe, steps=STEPS)
    with asyncdiff.parallelize(pipe, runtime="local", guidance_refresh=2, **options):
        made = [generate(pipe, steps=STEPS, **call) for call in calls]
    assert torch.equal(made[0], made[-1])
    with asyncdiff.parallelize(pipe, runtime="local", guidance_refresh=2, **options):
        assert torch.equal(generate(pipe, steps=STEPS, **calls[2]), made[2])
    if "devices" in options:
        expected = by_reference(pipe, 2, **calls[2])
        torch.testing.assert_close(made[2], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(generate(pipe, steps=STEPS), alone)


# -- guidance as two calls -----------------------------------------------------------------------------------


def second_calls_by_reference(pipe: Any, k: int, both: Any = None) -> torch.Tensor:
    """Wan's: the second call of every step is the half that is left out."""
    module = pipe.transformer
    forward = type(module).forward.__get__(module)
    every, left_out = both or (forward, forward)
    model = Refreshed([lambda **call: left_out(**call), lambda **call: every(**call)], k)
    first: list[dict[str, Any]] = []

    def run(**call: Any) -> Any:
        """The first call's is the second one's half, so it has to be known before."""
        if not first:
            first.append(call)
            return every(**call)
        model.both = [lambda **_: left_out(**call), lambda **_: made]
        made = every_made.pop()
        first.clear()
        return (model(hidden_states=torch.zeros(2))[0].chunk(2)[0],)

    every_made: list[Any] = []

    def noting(**call: Any) -> Any:
        result = run(**call)
        if first:
            every_made.append(result)
        return result

    with replaced_forward(module, noting):
        return generate_tiny(TINY_PIPELINES["wan-2.1"], pipe, TinyCall(steps=STEPS))


@pytest.mark.parametrize("k", [2, pytest.param(4, marks=pytest.mark.wide)])
def test_a_second_call_is_left_out(k: int) -> None:
    pipe = TINY_PIPELINES["wan-2.1"].build()
    expected = second_calls_by_reference(pipe, k)
    with asyncdiff.parallelize(pipe, devices=1, guidance_refresh=k) as handle:
        made = generate_tiny(TINY_PIPELINES["wan-2.1"], pipe, TinyCall(steps=STEPS))
        spans = [span for span in handle.last_run.timeline.spans if span.category == "compute"]
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)
    assert len(spans) == STEPS + 1 + len(range(k, STEPS, k))


def test_a_third_call_ends_it() -> None:
    """Skip-layer guidance between some steps: nothing is refreshed from then on."""
    pipe = TINY_PIPELINES["wan-2.1"].build()
    untouched = pipe.transformer.forward

    def make(forward: Callable[..., Any], first_third: int) -> torch.Tensor:
        calls = 0

        def run(**call: Any) -> Any:
            nonlocal calls
            step, place = divmod(calls, 2)
            calls += 1
            made = forward(**call)
            if place == 1 and step >= first_third:
                forward(**call)
            return made

        with replaced_forward(pipe.transformer, run):
            return generate_tiny(TINY_PIPELINES["wan-2.1"], pipe, TinyCall(steps=STEPS))

    alone = make(untouched, STEPS)
    for options in ({"devices": 1}, {"num_stages": 2, "partition": "chain"}):
        with asyncdiff.parallelize(pipe, runtime="local", **options):
            expected = make(pipe.transformer.forward, 0)
        with asyncdiff.parallelize(pipe, runtime="local", guidance_refresh=2, **options):
            with pytest.warns(AsyncDiffWarning, match="changes nothing .*more than two denoiser calls"):
                made = make(pipe.transformer.forward, 0)
            assert torch.equal(made, expected)
            assert not torch.equal(make(pipe.transformer.forward, STEPS), expected)
            make(pipe.transformer.forward, 5)
    with asyncdiff.parallelize(pipe, num_stages=2, guidance_refresh=2, warmup_steps=IN_ORDER):
        assert torch.equal(make(pipe.transformer.forward, 5), alone)


@pytest.mark.parametrize(
    "family",
    [
        "qwen-image",
        *(
            pytest.param(name, marks=pytest.mark.wide)
            for name in ("cogview4", "flux-true-cfg", "wan-2.2", "sd35-skip-layers")
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("num_stages", ONE_OR_TWO)
def test_other_pipelines_with_two_calls(family: str, num_stages: int) -> None:
    stand_in = TINY_PIPELINES[family]
    pipe = stand_in.build()
    call = TinyCall(steps=8)
    alone = generate_tiny(stand_in, pipe, call)
    with asyncdiff.parallelize(pipe, num_stages=num_stages, guidance_refresh=2, warmup_steps=IN_ORDER):
        in_order = generate_tiny(stand_in, pipe, call)
        assert (in_order - alone).abs().max() <= 1e-3 * alone.abs().max()
    with asyncdiff.parallelize(pipe, num_stages=num_stages, guidance_refresh=2):
        made = generate_tiny(stand_in, pipe, call)
        assert not torch.equal(made, in_order)
        assert torch.equal(generate_tiny(stand_in, pipe, call), made)
    assert torch.equal(generate_tiny(stand_in, pipe, call), alone)


# -- settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_refresh": 0}, "guidance_refresh must be at least 1"),
        ({"guidance_refresh": "2"}, "guidance_refresh must be an integer"),
        ({"guidance_refresh": 2, "guidance": "split"}, 'guidance="split" exclude each other'),
        ({"guidance_refresh": 2, "stride": 2}, "goes with stride=1"),
        ({"guidance_refresh": 2, "time_shift": True}, "goes with time_shift=False"),
        ({"guidance_refresh": 2, "warmup_steps": "auto"}, "goes with a number of warmup_steps"),
        ({"guidance_refresh": 2, "forecast": "linear"}, 'needs forecast="latents"'),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        asyncdiff.parallelize(sd(), num_stages=2, **options)


def test_a_nested_split_is_refused_and_never_chosen() -> None:
    pipe = sd()
    with (
        asyncdiff.parallelize(pipe, num_stages=2, partition="nested", guidance_refresh=2),
        pytest.raises(ConfigurationError, match="goes with a chain"),
    ):
        generate(pipe)
    with asyncdiff.parallelize(pipe, num_stages=2, guidance_refresh=2) as handle:
        generate(pipe)
        assert handle.plan is not None
        assert handle.plan.kind == "chain"


def test_a_saved_plan_refreshes_likewise() -> None:
    pipe = sd()
    with asyncdiff.parallelize(pipe, num_stages=2, guidance_refresh=4) as handle:
        expected = generate(pipe, steps=STEPS)
        plan = handle.plan
    assert plan is not None
    read = Plan.from_json(plan.to_json())
    assert read == plan
    with asyncdiff.parallelize(pipe, plan=read):
        assert torch.equal(generate(pipe, steps=STEPS), expected)


def test_auto_leaves_the_halves_together() -> None:
    pipe = sd()
    with asyncdiff.parallelize(pipe, 2, runtime="local", guidance_refresh=2) as handle:
        generate(pipe)
        assert handle.plan is not None
        assert (handle.plan.groups, handle.plan.num_stages) == (1, 2)
