"""A ControlNet on a device of its own: exactly, or on latents that are continued."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from controlnet_pipelines import FAMILIES
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from method_reference import Course

import asyncdiff
from asyncdiff.demo import GUIDANCE_SCALE, load_demo_pipeline
from asyncdiff.errors import ConfigurationError, ParallelizedError
from asyncdiff.pipeline.controlnet_cost import examine_controlnet
from asyncdiff.pipeline.examination import examine
from asyncdiff.pipeline.user_warning import AsyncDiffWarning
from asyncdiff.runtime.awaited import AwaitedTensor
from asyncdiff.runtime.local import LocalExecutor
from asyncdiff.stage import StageReplica
from asyncdiff.tiny import TINY_PIPELINES, TinyCall
from asyncdiff.tiny.parts import quiet

pytestmark = pytest.mark.filterwarnings("ignore::asyncdiff.pipeline.user_warning.AsyncDiffWarning")

ONE: dict[str, Any] = {"num_stages": 1, "guidance": "together"}


def first_of(names: Iterable[str], *few: str) -> list[Any]:
    """A few by default, the others with the wide tests."""
    return [pytest.param(name, marks=() if name in few else pytest.mark.wide) for name in names]


def end_early(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    pipe._interrupt = step >= 2
    return {}


WAYS_TO_CALL: dict[str, dict[str, Any]] = {
    "ends early": {"control_guidance_end": 0.5},
    "starts late": {"control_guidance_start": 0.4},
    "weaker": {"controlnet_conditioning_scale": 0.4},
    "guess mode": {"guess_mode": True},
    "no guidance": {"guidance_scale": 1.0},
    "two pictures": {"num_images_per_prompt": 2},
    "interrupted": {"callback_on_step_end": end_early},
}


@pytest.mark.parametrize("name", first_of(FAMILIES, "sdxl", "flux"))
def test_overlap_is_bitwise_the_untouched_pipeline(name: str) -> None:
    family = FAMILIES[name]
    pipe = family.build()
    expected = [family.generate(pipe), family.generate(pipe, seed=1, large=True)]
    with asyncdiff.parallelize(pipe, controlnet="overlap", **ONE):
        made = [family.generate(pipe), family.generate(pipe, seed=1, large=True), family.generate(pipe)]
    assert all(map(torch.equal, made, [*expected, expected[0]]))
    assert torch.equal(family.generate(pipe), expected[0])


@pytest.mark.parametrize("num_stages", [1, pytest.param(2, marks=pytest.mark.wide)])
def test_overlap_changes_nothing_of_refreshed_guidance(num_stages: int) -> None:
    family = FAMILIES["sdxl"]
    pipe = family.build()
    exact = family.generate(pipe)
    refreshed: dict[str, Any] = {"num_stages": num_stages, "guidance_refresh": 2}
    made = []
    for controlnet in ("serial", "overlap"):
        with asyncdiff.parallelize(pipe, controlnet=controlnet, **refreshed):
            made.append(family.generate(pipe))
    assert torch.equal(*made)
    assert not torch.equal(made[0], exact)


@pytest.mark.parametrize("way", first_of(WAYS_TO_CALL, "ends early", "guess mode"))
@pytest.mark.parametrize("name", ["sd15", pytest.param("sdxl", marks=pytest.mark.wide)])
def test_overlap_is_exact_however_the_pipeline_is_called(name: str, way: str) -> None:
    family, changes = FAMILIES[name], WAYS_TO_CALL[way]
    pipe = family.build()
    expected = family.generate(pipe, **changes)
    with asyncdiff.parallelize(pipe, controlnet="overlap", **ONE):
        assert torch.equal(family.generate(pipe, **changes), expected)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sd15", {"num_stages": 2, "partition": "chain"}),
        pytest.param("sdxl", {"num_stages": 1, "guidance": "split"}, marks=pytest.mark.wide),
        pytest.param("sd15", {"num_stages": 2, "partition": "nested"}, marks=pytest.mark.wide),
        pytest.param("sd15", {"num_stages": 2, "stride": 2}, marks=pytest.mark.wide),
        pytest.param("sdxl", {"num_stages": 3, "forecast": "none"}, marks=pytest.mark.wide),
        pytest.param("sdxl", {"num_stages": 2, "guidance": "split"}, marks=pytest.mark.wide),
        pytest.param("flux", {"num_stages": 2}, marks=pytest.mark.wide),
        pytest.param("qwen-image", {"num_stages": 1, "guidance": "split"}, marks=pytest.mark.wide),
        pytest.param("qwen-image", {"num_stages": 2, "guidance": "split"}, marks=pytest.mark.wide),
        pytest.param("sd15", {"num_stages": 2, "warmup_steps": "auto"}, marks=pytest.mark.wide),
    ],
)
def test_overlap_computes_what_stages_and_groups_do_without_it(name: str, options: dict[str, Any]) -> None:
    family = FAMILIES[name]
    pipe = family.build()
    made = []
    for controlnet in ("serial", "overlap"):
        with asyncdiff.parallelize(pipe, controlnet=controlnet, **options):
            made.append(family.generate(pipe, steps=6))
    assert torch.equal(*made)


def test_denoiser_has_begun_when_the_controlnet_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    run, prediction = StageReplica.run, LocalExecutor.prediction

    def noting_run(replica: StageReplica, *args: Any) -> Any:
        events.append(f"{type(replica.module).__name__} begins")
        made = run(replica, *args)
        events.append(f"{type(replica.module).__name__} ends")
        return made

    def noting_prediction(executor: LocalExecutor, *args: Any) -> Any:
        events.append("asked for a result")
        return prediction(executor, *args)

    family = FAMILIES["sd15"]
    pipe = family.build()
    with asyncdiff.parallelize(pipe, controlnet="overlap", **ONE):
        family.generate(pipe)
        monkeypatch.setattr(StageReplica, "run", noting_run)
        monkeypatch.setattr(LocalExecutor, "prediction", noting_prediction)
        family.generate(pipe, steps=3)
    denoiser = type(pipe.unet).__name__
    of_step = [
        "ControlNetModel begins", "ControlNetModel ends", f"{denoiser} begins", "asked for a result",
        f"{denoiser} ends", "asked for a result",
    ]  # fmt: skip
    assert events == of_step * (len(events) // 6)
    assert len(events) >= 3 * 6


class AheadOfItsCall:
    """In the place of a ControlNet's forward: from the second step after warm-up on it is given the latents
    of the step before, continued, unless the strength has just changed."""

    def __init__(self, pipe: Any, warmup_steps: int) -> None:
        self.curve = Course()
        self.forward = pipe.controlnet.forward
        self.scheduler, self.warmup_steps = pipe.scheduler, warmup_steps
        self.step = 0
        self.next: torch.Tensor | None = None
        self.strength: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(self.forward).bind(*args, **kwargs).arguments
        name = next(iter(given))
        latents, ahead = given[name], self.next
        strength, self.strength = self.strength, given["conditioning_scale"]
        self.curve.follow(float(self.scheduler.timesteps[self.step]), latents)
        if ahead is not None and strength == given["conditioning_scale"]:
            given[name] = ahead
        self.step += 1
        if self.warmup_steps < self.step < len(self.scheduler.timesteps):
            self.next = self.curve.continued(float(self.scheduler.timesteps[self.step])).to(latents.dtype)
        return self.forward(**given)


@pytest.mark.parametrize(
    ("name", "warmup_steps", "changes"),
    [
        ("sd15", 1, {}),
        pytest.param("sdxl", 2, {}, marks=pytest.mark.wide),
        ("sd15", 1, {"control_guidance_end": 0.5}),
        pytest.param("two", 1, {}, marks=pytest.mark.wide),
        pytest.param("flux", 3, {}, marks=pytest.mark.wide),
        pytest.param("sdxl", 1, {"control_guidance_start": 0.3}, marks=pytest.mark.wide),
        pytest.param("sdxl", 1, {"guess_mode": True}, marks=pytest.mark.wide),
        pytest.param("sana", 2, {}, marks=pytest.mark.wide),
    ],
)
def test_ahead_equals_an_independent_model(name: str, warmup_steps: int, changes: dict[str, Any]) -> None:
    family = FAMILIES[name]
    pipe = family.build()
    exact = family.generate(pipe, steps=8, **changes)
    with asyncdiff.parallelize(pipe, controlnet="ahead", warmup_steps=warmup_steps, **ONE):
        made = family.generate(pipe, steps=8, **changes)
        assert torch.equal(family.generate(pipe, steps=8, **changes), made), "it knows of the run before"
    pipe.controlnet.forward = AheadOfItsCall(pipe, warmup_steps)
    expected = family.generate(pipe, steps=8, **changes)
    assert not torch.allclose(expected, exact, rtol=1e-4, atol=1e-4)
    # The reference sums in double precision, over all elements.
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", first_of(FAMILIES, "sd15"))
def test_ahead_in_warmup_is_bitwise_the_untouched_pipeline(name: str) -> None:
    family = FAMILIES[name]
    pipe = family.build()
    expected = family.generate(pipe)
    num_steps = len(pipe.scheduler.timesteps)
    options = {**ONE, "controlnet": "ahead", "warmup_steps": num_steps - 1}
    with asyncdiff.parallelize(pipe, **options) as handle:
        assert torch.equal(family.generate(pipe), expected), "the first step after warm-up is exact too"
        handle.set(warmup_steps=1)
        different = family.generate(pipe)
        handle.set(warmup_steps=num_steps)
        assert torch.equal(family.generate(pipe), expected)
    assert not torch.equal(different, expected)


def test_every_step_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES["sdxl"]
    pipe = family.build()
    steps: list[int] = []
    run_round = LocalExecutor.run_round

    def noting(executor: LocalExecutor, call: Any) -> None:
        if executor._rank_stages[0] is None:
            steps.append(call.info.first_step)
        run_round(executor, call)

    monkeypatch.setattr(LocalExecutor, "run_round", noting)
    with asyncdiff.parallelize(pipe, controlnet="ahead", warmup_steps=2, **ONE) as handle:
        family.generate(pipe, steps=6)
        assert steps == [0, 1, 2, 3, 4, 5]
        steps.clear()
        family.generate(pipe, steps=6, control_guidance_end=0.5)
        assert steps == [0, 1, 2, 3, 3, 4, 5], "its strength was another than expected"
        assert len(handle.last_run.steps) == 6


def test_timesteps_that_cannot_be_foreseen_end_the_work_ahead() -> None:
    family = FAMILIES["sd15"]
    pipe = family.build()

    def stretch(module: Any) -> Callable[..., Any]:
        forward = module.forward
        return lambda sample, timestep, *args, **kwargs: forward(sample, timestep * 1.25, *args, **kwargs)

    pipe.controlnet.forward = stretch(pipe.controlnet)
    expected = family.generate(pipe)
    del pipe.controlnet.forward
    with asyncdiff.parallelize(pipe, controlnet="ahead", **ONE):
        pipe.controlnet.forward = stretch(pipe.controlnet)
        with pytest.warns(AsyncDiffWarning, match="cannot be foreseen"):
            assert torch.equal(family.generate(pipe), expected)


def test_inputs_that_change_otherwise_end_the_work_ahead() -> None:
    """A constant input that is another at every step is seen to be, and what was made of the last is not
    used."""
    family = FAMILIES["sd15"]
    pipe = family.build()

    def disturb(module: Any) -> Callable[..., Any]:
        forward = module.forward

        def disturbed(*args: Any, conditioning_scale: float, **kwargs: Any) -> Any:
            scales.append(conditioning_scale + 0.1 * len(scales))
            return forward(*args, conditioning_scale=scales[-1], **kwargs)

        scales: list[float] = []
        return disturbed

    pipe.controlnet.forward = disturb(pipe.controlnet)
    expected = family.generate(pipe, steps=7)
    del pipe.controlnet.forward
    with asyncdiff.parallelize(pipe, controlnet="ahead", **ONE):
        pipe.controlnet.forward = disturb(pipe.controlnet)
        with pytest.warns(AsyncDiffWarning, match="does not work ahead any more"):
            assert torch.equal(family.generate(pipe, steps=7), expected)


def test_nothing_that_is_awaited_reaches_a_callback() -> None:
    family = FAMILIES["sd15"]
    pipe = family.build()
    kinds: set[type] = set()

    def note(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        kinds.update(map(type, tensors.values()))
        return {}

    names = pipe._callback_tensor_inputs
    with asyncdiff.parallelize(pipe, controlnet="overlap", **ONE):
        family.generate(pipe, callback_on_step_end=note, callback_on_step_end_tensor_inputs=names)
    assert kinds == {torch.Tensor}


def test_what_a_call_returned_stays_what_it_was() -> None:
    """Whoever keeps it may look at it in the next step, in the next run, or when nothing is divided."""
    family = FAMILIES["sd15"]
    pipe = family.build()
    kept: list[Any] = []

    def keep(module: Any) -> Callable[..., Any]:
        forward = module.forward

        def keeping(*args: Any, **kwargs: Any) -> Any:
            kept.append(forward(*args, **kwargs)[1])
            return [torch.zeros(2, 8, 8, 8)] * 0, kept[-1]

        return keeping

    pipe.unet.forward = lambda sample, *args, **kwargs: (sample * 0.5,)
    pipe.controlnet.forward = keep(pipe.controlnet)
    family.generate(pipe, steps=3)
    expected = [each.clone() for each in kept]
    kept.clear()
    del pipe.controlnet.forward, pipe.unet.forward
    handle = asyncdiff.parallelize(pipe, controlnet="overlap", **ONE)
    divided = pipe.unet.forward, pipe.controlnet.forward
    pipe.unet.forward = lambda sample, *args, **kwargs: (sample * 0.5,)
    pipe.controlnet.forward = keep(pipe.controlnet)
    family.generate(pipe, steps=3)
    pipe.unet.forward, pipe.controlnet.forward = divided
    handle.remove()
    assert {type(each) for each in kept} == {AwaitedTensor}
    assert all(map(torch.equal, kept, expected))


@pytest.mark.parametrize("controlnet", ["overlap", "ahead"])
def test_removal_leaves_nothing_behind(controlnet: str) -> None:
    family = FAMILIES["sd15"]
    pipe = family.build()
    gc.collect()
    others = len(awaited_tensors())
    before = set(vars(pipe.controlnet)), {name: id(each) for name, each in pipe.controlnet.named_parameters()}
    with asyncdiff.parallelize(pipe, controlnet=controlnet, **ONE):
        family.generate(pipe)
        with pytest.raises(ParallelizedError, match="save_pretrained"):
            pipe.controlnet.save_pretrained("nowhere")
    after = set(vars(pipe.controlnet)), {name: id(each) for name, each in pipe.controlnet.named_parameters()}
    assert after == before
    gc.collect()
    assert len(awaited_tensors()) == others


def awaited_tensors() -> list[Any]:
    return [each for each in gc.get_objects() if type(each) is AwaitedTensor]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"controlnet": "soon"}, 'must be "serial", "overlap" or "ahead"'),
        ({"controlnet": "overlap", "devices": 1}, "Pass at least 2"),
        ({"controlnet": "ahead", "devices": ["cpu"]}, "Pass at least 2"),
        ({"controlnet": "overlap", "devices": 2, "num_stages": 2}, "needs 2 devices"),
        ({"controlnet": "overlap", "devices": 2, "runtime": "torchrun"}, "torchrun"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        asyncdiff.parallelize(FAMILIES["sd15"].build(), **options)


def test_pipeline_without_a_controlnet_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="has no ControlNet"):
        asyncdiff.parallelize(TINY_PIPELINES["sd15"].build(), num_stages=1, controlnet="overlap")


def test_controlnet_that_shares_weights_is_refused() -> None:
    pipe = FAMILIES["sd15"].build()
    pipe.controlnet.conv_in = pipe.unet.conv_in
    with pytest.raises(ConfigurationError, match="shares weights"):
        asyncdiff.parallelize(pipe, num_stages=1, controlnet="overlap")


def test_in_inference_mode() -> None:
    family = FAMILIES["sd15"]
    pipe = family.build()
    expected = family.generate(pipe)
    with asyncdiff.parallelize(pipe, controlnet="overlap", **ONE):
        family.generate(pipe)
        with torch.inference_mode():
            assert torch.equal(family.generate(pipe), expected)


def test_plan_leaves_the_last_device_to_the_controlnet() -> None:
    family = FAMILIES["sd15"]
    pipe = family.build()
    example = family.arguments(TinyCall())
    expected = family.generate(pipe)
    options: dict[str, Any] = {"devices": ["cpu"] * 3, "num_stages": 2, "controlnet": "overlap"}
    plan = asyncdiff.plan(pipe, **options, profile=True, example=example)
    assert len(plan.devices) == plan.num_workers == 2
    assert torch.equal(family.generate(pipe), expected), "it has left something behind"
    with pytest.raises(ConfigurationError, match="Pass at least 2"):
        asyncdiff.plan(pipe, devices=1, controlnet="ahead", example=example)
    with asyncdiff.parallelize(pipe, plan=plan, devices=3, runtime="local", controlnet="overlap"):
        by_plan = family.generate(pipe)
    with asyncdiff.parallelize(pipe, plan=plan, runtime="local"):
        assert torch.equal(by_plan, family.generate(pipe))


def test_denoiser_is_seen_to_read_residuals_on_the_way_up() -> None:
    family = FAMILIES["sd15"]
    pipe = family.build()
    looked = examine_controlnet(pipe, family.arguments(TinyCall()), weights_at_hand=True)
    names = {name.partition(".")[0] for name in looked.read_as}
    assert names == {"down_block_additional_residuals", "mid_block_additional_residual"}
    denoiser = examine(pipe.unet, looked.denoiser_inputs, weights_at_hand=True)
    whole = denoiser.recording.calls[0].key
    seconds = {call.key: 1.0 for call in denoiser.recording.calls} | {whole: 100.0}
    cost = looked.cost(7.0, denoiser, seconds)
    before = ["conv_in", "time", "down_blocks.0", "down_blocks.1", "mid_block"]
    assert 3.0 <= cost.read_after_seconds <= len(before), "what comes before the blocks on the way up"
    plans = [each.plan(2, ["cpu", "cpu"]).predictions for each in (denoiser, looked.before(denoiser))]
    assert [each and each.latents_stages for each in plans] == [(0,), (0, 1)], (
        "the second one reads residuals"
    )
    assert cost.seconds == 7.0
    assert cost.output_bytes == sum(spec.num_bytes for spec in looked.output.tensors)


def test_ahead_changes_little_of_what_a_controlnet_changes() -> None:
    """With hidden states of a trained U-Net, and a ControlNet made of its weights. Not a trained one: this
    bounds how the latents are continued, and says nothing about pictures."""
    demo = load_demo_pipeline()
    levels = len(demo.vae.config.block_out_channels)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        controlnet = ControlNetModel.from_unet(
            demo.unet, conditioning_embedding_out_channels=(16,) * levels
        ).eval()
        with torch.no_grad():
            for module in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
                module.weight.normal_(std=0.3 / module.weight[0].numel() ** 0.5)
            controlnet.controlnet_cond_embedding.conv_out.weight.normal_(std=0.1)
    parts = demo.components | {"controlnet": controlnet}
    pipe = quiet(StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False))
    side = demo.unet.config.sample_size * 2 ** (levels - 1)
    picture = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1))

    def generate(strength: float = 1.0) -> torch.Tensor:
        made: torch.Tensor = pipe(
            "a red circle", image=picture, num_inference_steps=25, guidance_scale=GUIDANCE_SCALE,
            controlnet_conditioning_scale=strength, generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images  # fmt: skip
        return made

    exact, without = generate(), generate(strength=0.0)
    with asyncdiff.parallelize(pipe, controlnet="ahead", **ONE):
        ahead = generate()
    change = (without - exact).norm() / exact.norm()
    error = (ahead - exact).norm() / exact.norm()
    assert change > 0.05
    assert 0 < error < 0.1 * change
