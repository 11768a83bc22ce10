"""Watching real noise schedulers of diffusers, alone and inside real pipelines with tiny random weights."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    CogVideoXDPMScheduler,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

from asyncdiff.pipeline.noise_scheduler import (
    begin_index_of,
    first_match,
    is_watched,
    new_tracker,
    num_timesteps_of,
    same_timestep,
    scaled_inputs_of,
    timesteps_of,
    unwatch,
    watch,
)
from asyncdiff.tracking import Position

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

SCHEDULERS = [
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DPMSolverSDEScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "SASolverScheduler",
    "IPNDMScheduler",
    "LMSDiscreteScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "EDMEulerScheduler",
    "EDMDPMSolverMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
]
SLICED = [name for name in SCHEDULERS if name not in ("IPNDMScheduler", "SASolverScheduler")]


def make(name: str) -> Any:
    """A noise scheduler with its defaults; skips where a package that diffusers needs for it is missing."""
    if name == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")
    if name in ("LMSDiscreteScheduler", "DPMSolverSDEScheduler"):
        pytest.importorskip("scipy")
    options: dict[str, Any] = {
        "PNDMScheduler": {"skip_prk_steps": True},
        "DPMSolverSDEScheduler": {"noise_sampler_seed": 0},
    }.get(name, {})
    return getattr(diffusers, name)(**options)


def denoise(
    scheduler: Any, tracker: Any, num_inference_steps: int = 6, t_start: int = 0, stop: int | None = None
) -> list[tuple[int, Position]]:
    """The loop of diffusers' pipelines; each denoiser call's true step, counted here, and its position."""
    scheduler.set_timesteps(num_inference_steps)
    timesteps = scheduler.timesteps[t_start * scheduler.order :]
    if t_start and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(t_start * scheduler.order)
    latents = torch.ones(1, 4, 4, 4)
    placed = []
    for step, t in enumerate(timesteps[:stop]):
        model_input = (
            scheduler.scale_model_input(latents, t) if hasattr(scheduler, "scale_model_input") else latents
        )
        placed.append((step, tracker.place(hint=t.expand(1))))
        latents = scheduler.step(0.1 * model_input, t, latents, return_dict=False)[0]
    return placed


@pytest.mark.parametrize("name", SCHEDULERS)
def test_position_is_the_step_that_the_loop_counts(name: str) -> None:
    scheduler, tracker = make(name), new_tracker()
    watch(scheduler, tracker)
    for run in range(2):
        placed = denoise(scheduler, tracker)
        assert len(placed) == len(scheduler.timesteps)
        for step, position in placed:
            assert position.placed, position.reason
            assert (position.run, position.step, position.channel) == (run, step, 0)
            assert (position.num_steps, position.timestep_index) == (len(placed), step)
            assert position.first_step == 0
            assert position.new_run == (step == 0)
            assert position.new_step


@pytest.mark.parametrize("name", SLICED)
def test_image_to_image_slice_has_its_own_steps(name: str) -> None:
    scheduler, tracker = make(name), new_tracker()
    watch(scheduler, tracker)
    placed = denoise(scheduler, tracker, num_inference_steps=8, t_start=3)
    first = len(scheduler.timesteps) - len(placed)
    for step, position in placed:
        assert position.placed
        assert (position.step, position.num_steps) == (step, len(placed))
        assert position.timestep_index == first + step


@pytest.mark.parametrize("name", SCHEDULERS)
def test_run_after_one_that_was_stopped_begins_at_step_0(name: str) -> None:
    scheduler, tracker = make(name), new_tracker()
    watch(scheduler, tracker)
    denoise(scheduler, tracker, stop=3)
    tracker.place()  # an exception, an interrupt: this call has no step
    assert [(p.run, p.step) for _, p in denoise(scheduler, tracker)] == [
        (1, step) for step in range(len(scheduler.timesteps))
    ]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_watching_changes_no_number(name: str) -> None:
    def latents(scheduler: Any) -> list[torch.Tensor]:
        scheduler.set_timesteps(5)
        x, out = torch.linspace(-1, 1, 64).reshape(1, 4, 4, 4), []
        kwargs = {}
        if "generator" in inspect.signature(scheduler.step).parameters:
            kwargs["generator"] = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        for t in scheduler.timesteps:
            x = scheduler.step(0.1 * x, t, x, return_dict=False, **kwargs)[0]
            out.append(x)
        return out

    plain, watched = make(name), make(name)
    watch(watched, new_tracker())
    assert all(torch.equal(a, b) for a, b in zip(latents(plain), latents(watched), strict=True))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_signatures_are_the_methods_own(name: str) -> None:
    """diffusers' pipelines look into them for `timesteps`, `sigmas`, `eta` and `generator`."""
    scheduler = make(name)
    before = [inspect.signature(m) for m in (scheduler.set_timesteps, scheduler.step)]
    watch(scheduler, new_tracker())
    assert [inspect.signature(m) for m in (scheduler.set_timesteps, scheduler.step)] == before
    assert scheduler.step.__doc__ == type(scheduler).step.__doc__


@pytest.mark.parametrize("name", SCHEDULERS)
def test_unwatching_restores_the_instance(name: str) -> None:
    scheduler, tracker = make(name), new_tracker()
    before = dict(scheduler.__dict__)
    watch(scheduler, tracker)
    assert is_watched(scheduler)
    unwatch(scheduler, tracker)
    assert not is_watched(scheduler)
    assert list(scheduler.__dict__) == list(before)
    assert all(scheduler.__dict__[key] is before[key] for key in before)


def test_unwatching_restores_a_method_that_was_replaced_before() -> None:
    scheduler, tracker = EulerDiscreteScheduler(), new_tracker()
    calls = []
    original = scheduler.step

    def counting_step(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[1])
        return original(*args, **kwargs)

    scheduler.step = counting_step
    watch(scheduler, tracker)
    assert len(denoise(scheduler, tracker, 3)) == 3
    assert len(calls) == 3
    unwatch(scheduler, tracker)
    assert scheduler.step is counting_step


def test_wrapper_around_ours_keeps_working_after_unwatching() -> None:
    scheduler, tracker = DDIMScheduler(), new_tracker()
    watch(scheduler, tracker)
    ours = scheduler.step
    scheduler.step = lambda *args, **kwargs: ours(*args, **kwargs)
    unwatch(scheduler, tracker)
    assert not is_watched(scheduler)
    assert not denoise(scheduler, tracker, 2)[0][1].placed


def test_two_trackers_watch_one_noise_scheduler() -> None:
    scheduler, a, b = EulerDiscreteScheduler(), new_tracker(), new_tracker()
    watch(scheduler, a)
    watch(scheduler, b)
    watch(scheduler, b)
    scheduler.set_timesteps(4)
    for step, t in enumerate(scheduler.timesteps):
        assert a.place().step == b.place().step == step
        scheduler.step(torch.zeros(1, 1), t, torch.zeros(1, 1))
    unwatch(scheduler, a)
    assert is_watched(scheduler, b)
    assert not is_watched(scheduler, a)
    scheduler.set_timesteps(4)
    assert b.place().placed
    assert not a.place().placed
    unwatch(scheduler, a)  # not watching: nothing to do
    unwatch(scheduler, b)
    assert "step" not in scheduler.__dict__


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copy_is_unwatched_and_steps_for_itself(copied: Any) -> None:
    scheduler, tracker = EulerDiscreteScheduler(), new_tracker()
    watch(scheduler, tracker)
    scheduler.set_timesteps(4)
    names = set(scheduler.__dict__) - {"set_timesteps", "step", "scale_model_input", "__getstate__"}
    other = copied(scheduler)
    assert set(other.__dict__) == names
    assert not is_watched(other)
    assert tracker.place().step == 0
    other.step(torch.zeros(1, 1), other.timesteps[0], torch.zeros(1, 1))
    other.set_timesteps(7)
    assert tracker.place().channel == 1, "the copy's step and run were reported"
    assert other.step_index is None
    assert scheduler.step_index is None
    assert len(scheduler.timesteps) == 4


def test_state_put_back_into_a_noise_scheduler_leaves_it_watched() -> None:
    """MultiDiffusion (StableDiffusionPanoramaPipeline) keeps a deep copy of `__dict__` per view."""
    scheduler, tracker = PNDMScheduler(skip_prk_steps=True), new_tracker()
    watch(scheduler, tracker)
    scheduler.set_timesteps(5)
    states = [copy.deepcopy(scheduler.__dict__) for _ in range(2)]
    for step, t in enumerate(scheduler.timesteps):
        for view in range(2):
            scheduler.__dict__.update(states[view])
            if view == 0:
                assert tracker.place().step == step
            scheduler.step(torch.zeros(1, 1), t, torch.zeros(1, 1))
            states[view] = copy.deepcopy(scheduler.__dict__)
    assert is_watched(scheduler, tracker)


def test_configuration_is_not_touched(tmp_path: Any) -> None:
    scheduler, tracker = EulerDiscreteScheduler(beta_end=0.02), new_tracker()
    shown = repr(scheduler)  # adds the class name to the configuration
    config = dict(scheduler.config)
    watch(scheduler, tracker)
    assert dict(scheduler.config) == config
    assert repr(scheduler) == shown
    assert not is_watched(DDIMScheduler.from_config(scheduler.config))
    scheduler.save_pretrained(tmp_path)
    assert dict(EulerDiscreteScheduler.from_pretrained(tmp_path).config)["beta_end"] == 0.02


def test_noise_scheduler_that_turns_up_at_a_call_has_a_run_open() -> None:
    first, second, tracker = DDIMScheduler(), EulerDiscreteScheduler(), new_tracker()
    watch(first, tracker)
    denoise(first, tracker, 3)
    second.set_timesteps(6)
    second.set_begin_index(2)
    unwatch(first, tracker)
    watch(second, tracker, run_is_open=True)
    position = tracker.place()
    assert (position.run, position.step, position.num_steps) == (1, 0, 4)


def test_noise_scheduler_watched_in_the_middle_of_a_run_opens_none() -> None:
    scheduler, tracker = DDIMScheduler(), new_tracker()
    scheduler.set_timesteps(4)
    watch(scheduler, tracker)
    assert not tracker.place().placed


def test_scaled_inputs_are_those_since_the_last_step() -> None:
    scheduler, tracker = EulerDiscreteScheduler(), new_tracker()
    assert scaled_inputs_of(scheduler) == ()
    watch(scheduler, tracker)
    scheduler.set_timesteps(4)
    for t in scheduler.timesteps:
        results = [scheduler.scale_model_input(torch.ones(n, 1), t) for n in (2, 1)]
        assert all(a is b for a, b in zip(scaled_inputs_of(scheduler), results, strict=True))
        scheduler.step(torch.zeros(1, 1), t, torch.zeros(1, 1))
        assert scaled_inputs_of(scheduler) == ()
    scheduler.scale_model_input(torch.ones(1, 1), scheduler.timesteps[-1])
    scheduler.set_timesteps(4)
    assert scaled_inputs_of(scheduler) == ()
    unwatch(scheduler, tracker)
    assert "scale_model_input" not in scheduler.__dict__


def test_step_that_raises_is_not_reported() -> None:
    scheduler, tracker = EulerDiscreteScheduler(), new_tracker()
    watch(scheduler, tracker)
    scheduler.set_timesteps(4)
    tracker.place()
    with pytest.raises(ValueError, match="integer indices"):
        scheduler.step(torch.zeros(1, 1), 3, torch.zeros(1, 1))
    assert (tracker.place().step, tracker.place().channel) == (0, 2)


def test_step_for_each_image_of_a_batch_is_one_step() -> None:
    scheduler, tracker = DDIMScheduler(), new_tracker()
    watch(scheduler, tracker)
    scheduler.set_timesteps(5)
    for step in range(5):
        assert tracker.place().step == step
        for _image in range(3):
            # a new tensor object each time, for the same entry of the timesteps
            scheduler.step(torch.zeros(1, 1), timestep=scheduler.timesteps[step], sample=torch.zeros(1, 1))


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"])
def test_two_denoisers_that_share_the_steps(name: str) -> None:
    """Wan 2.2: one denoiser for the noisy steps, another for the rest, each with a tracker of its own."""
    scheduler, high, low = make(name), new_tracker(), new_tracker()
    watch(scheduler, high)
    watch(scheduler, low)
    scheduler.set_timesteps(8)
    for step, t in enumerate(scheduler.timesteps):
        position = (high if step < 3 else low).place(hint=t.expand(2))
        assert position.placed
        assert (position.step, position.timestep_index) == (step, step)
        assert position.num_steps == len(scheduler.timesteps)
        assert position.first_step == (0 if step < 3 else 3)
        scheduler.step(torch.zeros(1, 1), t, torch.zeros(1, 1))


def test_timestep_of_a_step_is_found_by_its_name() -> None:
    """CogVideoXDPMScheduler.step(model_output, old_pred_original_sample, timestep, timestep_back, sample)."""
    scheduler, tracker = CogVideoXDPMScheduler(), new_tracker()
    watch(scheduler, tracker)
    scheduler.set_timesteps(4)
    parts: list[tuple[torch.Tensor, torch.Tensor | None]] = [
        (torch.zeros(1, 1), None),
        (torch.ones(1, 1), None),
    ]
    for step, t in enumerate(scheduler.timesteps):
        assert tracker.place().step == step
        back = scheduler.timesteps[step - 1] if step > 0 else None
        parts = [scheduler.step(0.1 * x, old, t, back, x, return_dict=False) for x, old in parts]


def test_step_within_a_step_is_not_reported() -> None:
    class RestartingScheduler(DDIMScheduler):
        """Goes to an intermediate timestep on its way, with timesteps set anew."""

        def step(self, model_output: Any, timestep: Any, sample: Any, **kwargs: Any) -> Any:
            if not kwargs.pop("inner", False):
                self.set_timesteps(self.num_inference_steps)
                sample = self.step(model_output, timestep + 1, sample, inner=True, return_dict=False)[0]
            return super().step(model_output, timestep, sample, **kwargs)

    scheduler, tracker = RestartingScheduler(), new_tracker()
    watch(scheduler, tracker)
    assert [(p.run, p.step) for _, p in denoise(scheduler, tracker, 4)] == [(0, step) for step in range(4)]


def test_begin_index_is_the_pipelines_else_the_first_match_less_the_steps_before() -> None:
    euler, pndm = EulerDiscreteScheduler(), PNDMScheduler(skip_prk_steps=True)
    euler.set_timesteps(10)
    assert begin_index_of(euler) == 0
    euler.set_begin_index(4)
    assert begin_index_of(euler, euler.timesteps[2]) == 4
    pndm.set_timesteps(10)
    assert pndm.timesteps[1] == pndm.timesteps[2]
    assert begin_index_of(pndm, pndm.timesteps[2].clone()) == 1
    assert begin_index_of(pndm, pndm.timesteps[2:][0].expand(2)) == 2, "a view of the timesteps tells more"
    assert begin_index_of(pndm, pndm.timesteps[6].expand(2)) == 6
    assert begin_index_of(pndm, pndm.timesteps[6], step=2) == 4
    assert begin_index_of(pndm, pndm.timesteps[6] / 1000) == 0
    assert begin_index_of(pndm) == 0
    assert num_timesteps_of(pndm) == 11


def test_first_match_refuses_what_is_ambiguous() -> None:
    timesteps = torch.tensor([999.0, 998.0, 500.0, 1.0])
    assert first_match(timesteps, torch.tensor([500.0, 500.0])) == 2
    assert first_match(timesteps, 500) == 2
    assert first_match(timesteps, torch.tensor([500.0, 1.0])) is None, "a timestep per token"
    assert first_match(timesteps, torch.tensor(999.0).bfloat16()) is None, "999 and 998 round to 1000"
    assert first_match(timesteps, torch.tensor(500.0).bfloat16()) == 2
    assert first_match(timesteps, 1.0) is None, "may be 1000 / 1000"
    assert first_match(timesteps, None) is None
    assert first_match(None, 3.0) is None


def test_same_timestep_tells_repeated_entries_apart() -> None:
    timesteps = torch.tensor([981, 961, 961, 941])
    assert same_timestep(timesteps[1], timesteps[1])
    assert not same_timestep(timesteps[1], timesteps[2])
    assert same_timestep(timesteps[1], torch.tensor(961))
    assert not same_timestep(timesteps[1], torch.tensor(941))
    assert same_timestep(3, 3)
    assert same_timestep(torch.tensor(3), 3)


def test_timesteps_kept_as_an_array_are_a_tensor() -> None:
    class ArrayTimesteps:
        timesteps = np.array([3, 2, 1])

    timesteps = timesteps_of(ArrayTimesteps())
    assert timesteps is not None
    assert timesteps.tolist() == [3, 2, 1]
    assert timesteps_of(object()) is None
    assert num_timesteps_of(object()) is None


# Real pipelines: the oracle is the pipeline's own loop, which reports its index to `callback_on_step_end`.


@pytest.fixture(scope="module")
def sd_components() -> dict[str, Any]:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 8), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8, attention_head_dim=2, norm_num_groups=4,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), in_channels=3, out_channels=3, latent_channels=4, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=16,
    )  # fmt: skip
    return {
        "unet": unet, "vae": vae, "text_encoder": None, "tokenizer": None, "safety_checker": None,
        "feature_extractor": None, "requires_safety_checker": False,
    }  # fmt: skip


class Recorder:
    """Places every denoiser call and notes the pipeline's own step index when the step ends."""

    def __init__(self, pipe: Any, denoiser: torch.nn.Module) -> None:
        self.tracker = new_tracker()
        watch(pipe.scheduler, self.tracker)
        self.denoiser, self.forward = denoiser, denoiser.forward
        self.calls: list[Position] = []
        self.steps: list[tuple[int, list[Position]]] = []

        def forward(*args: Any, **kwargs: Any) -> Any:
            timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
            context = getattr(getattr(denoiser, "_cache_context", None), "name", None)
            self.calls.append(self.tracker.place(context, hint=timestep))
            return self.forward(*args, **kwargs)

        denoiser.forward = forward  # type: ignore[method-assign]

    def on_step_end(self, pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        self.steps.append((index, self.calls))
        self.calls = []
        return {}

    def close(self) -> None:
        self.denoiser.forward = self.forward  # type: ignore[method-assign]


def sd_arguments(recorder: Recorder) -> dict[str, Any]:
    return {
        "prompt_embeds": torch.ones(1, 4, 8), "negative_prompt_embeds": torch.zeros(1, 4, 8),
        "output_type": "latent", "callback_on_step_end": recorder.on_step_end,
        "generator": torch.Generator().manual_seed(0),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("scheduler", "num_steps"),
    [
        (PNDMScheduler(skip_prk_steps=True), 6),
        (HeunDiscreteScheduler(), 9),
        (EulerAncestralDiscreteScheduler(), 5),
    ],
)
def test_text_to_image_pipeline(sd_components: dict[str, Any], scheduler: Any, num_steps: int) -> None:
    pipe = StableDiffusionPipeline(scheduler=scheduler, **sd_components)
    pipe.set_progress_bar_config(disable=True)
    recorder = Recorder(pipe, pipe.unet)
    for run in range(2):
        recorder.steps.clear()
        pipe(num_inference_steps=5, height=16, width=16, **sd_arguments(recorder))
        assert [index for index, _ in recorder.steps] == list(range(num_steps))
        for index, (position,) in recorder.steps:
            assert (position.run, position.step, position.num_steps) == (run, index, num_steps)
            assert position.placed
    recorder.close()


@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler(), PNDMScheduler(skip_prk_steps=True), EulerDiscreteScheduler()]
)
def test_image_to_image_pipeline(sd_components: dict[str, Any], scheduler: Any) -> None:
    pipe = StableDiffusionImg2ImgPipeline(scheduler=scheduler, **sd_components)
    pipe.set_progress_bar_config(disable=True)
    recorder = Recorder(pipe, pipe.unet)
    image = torch.zeros(1, 3, 16, 16)
    pipe(image=image, strength=0.5, num_inference_steps=10, **sd_arguments(recorder))
    num_steps = len(recorder.steps)
    total = len(scheduler.timesteps)
    assert num_steps == total - 5
    for index, (position,) in recorder.steps:
        assert (position.step, position.num_steps, position.timestep_index) == (index, num_steps, 5 + index)
    recorder.close()


def test_interrupted_pipeline_begins_anew(sd_components: dict[str, Any]) -> None:
    pipe = StableDiffusionPipeline(scheduler=DDIMScheduler(), **sd_components)
    pipe.set_progress_bar_config(disable=True)
    recorder = Recorder(pipe, pipe.unet)
    arguments = sd_arguments(recorder)

    def interrupt(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = index == 2
        return recorder.on_step_end(pipe, index, timestep, kwargs)

    pipe(num_inference_steps=5, height=16, width=16, **(arguments | {"callback_on_step_end": interrupt}))
    assert len(recorder.steps) == 3
    recorder.steps.clear()
    pipe(num_inference_steps=4, height=16, width=16, **arguments)
    assert [calls[0].step for _, calls in recorder.steps] == [0, 1, 2, 3]
    assert all(calls[0].run == 1 and calls[0].num_steps == 4 for _, calls in recorder.steps)
    recorder.close()


def test_flow_matching_pipeline_with_skip_layer_guidance(sd_components: dict[str, Any]) -> None:
    """Stable Diffusion 3: the denoiser is called twice at some of the steps."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=8, out_channels=4,
    )  # fmt: skip
    none = dict.fromkeys(
        ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    )
    pipe = StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=sd_components["vae"], **none
    )
    pipe.set_progress_bar_config(disable=True)
    recorder = Recorder(pipe, transformer)
    pipe(
        prompt_embeds=torch.ones(1, 4, 16), negative_prompt_embeds=torch.zeros(1, 4, 16),
        pooled_prompt_embeds=torch.ones(1, 8), negative_pooled_prompt_embeds=torch.zeros(1, 8),
        num_inference_steps=10, height=16, width=16, output_type="latent", guidance_scale=3.0,
        skip_guidance_layers=[1], skip_layer_guidance_start=0.25, skip_layer_guidance_stop=0.65,
        callback_on_step_end=recorder.on_step_end,
    )  # fmt: skip
    assert [index for index, _ in recorder.steps] == list(range(10))
    assert [len(calls) for _, calls in recorder.steps] == [1, 1, 1, 2, 2, 2, 2, 1, 1, 1]
    for index, calls in recorder.steps:
        assert [(p.step, p.channel, p.num_steps, p.placed) for p in calls] == [
            (index, channel, 10, True) for channel in range(len(calls))
        ]
    assert [calls[0].first_step for _, calls in recorder.steps] == [0, 0, 0, 0, 4, 4, 4, 4, 8, 8]
    recorder.close()
