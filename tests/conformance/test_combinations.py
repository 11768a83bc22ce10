"""What people combine with a pipeline: bitwise the same in order, and still there in asynchronous denoising.

Every combination is shown to matter: the picture differs from the one without it or, where it only changes
how the picture is computed, what does it is found in every stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise, starmap
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    StableDiffusionAdapterPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
    T2IAdapter,
)
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.layerwise_casting import LayerwiseCastingHook
from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from torch import nn

import asyncdiff
from asyncdiff.pipeline.handle import Handle
from asyncdiff.stage.compiled import CompiledForward
from asyncdiff.tiny import TINY_PIPELINES, TinyCall, TinyPipeline, generate
from asyncdiff.weights import named_tensors

pytestmark = pytest.mark.filterwarnings("ignore::asyncdiff.pipeline.user_warning.AsyncDiffWarning")

STEPS = 6
EVALUATIONS = STEPS + 1  # PNDM evaluates its second step twice
IN_ORDER, STALE = 99, 1
Change = Callable[[Any], None]


@dataclass(frozen=True)
class Combination:
    """`arguments`: to the call. `switch_on`, `switch_off`: on the pipeline. `of`: another pipeline made of
    the stand-in's components. `is_seen`: on a module of a stage, for what leaves the picture as it is.
    """

    name: str
    family: str = "sd15"
    arguments: dict[str, Any] = field(default_factory=dict)
    switch_on: Change | None = None
    switch_off: Change | None = None
    of: Callable[[Any], Any] | None = None
    is_seen: Callable[[nn.Module], bool] | None = None
    steps: int = STEPS

    @property
    def needed(self) -> dict[str, Any]:
        """The arguments without which the call is none, or not to be compared."""
        names = {"prompt", "height", "width", "output_type"} if self.switch_on else set()
        names |= set(self.arguments) if self.of else set()
        return {name: value for name, value in self.arguments.items() if name in names}

    @property
    def stand_in(self) -> TinyPipeline:
        return TINY_PIPELINES[self.family]

    def build(self) -> Any:
        pipe = self.stand_in.build()
        return pipe if self.of is None else self.of(pipe)

    def make(self, pipe: Any, seed: int = 0) -> torch.Tensor:
        """The picture with the arguments of the combination, whether it is switched on or not."""
        call = TinyCall(steps=self.steps, seed=seed)
        arguments = {name: _value(value, call) for name, value in self.arguments.items()}
        size = {} if self.of is None else {"height": None, "width": None}
        given = self.stand_in.arguments(call) | size | arguments
        return as_tensor(pipe(**{name: value for name, value in given.items() if value is not None})[0])


def _value(value: Any, call: TinyCall) -> Any:
    return value(call) if callable(value) and getattr(value, "of_call", False) else value


def of_call(function: Callable[[TinyCall], Any]) -> Callable[[TinyCall], Any]:
    """An argument that is made anew for every call."""
    function.of_call = True  # type: ignore[attr-defined]
    return function


def as_tensor(images: Any) -> torch.Tensor:
    import numpy as np

    if isinstance(images, list):
        return torch.stack([torch.as_tensor(np.asarray(image)) for image in images])
    return torch.as_tensor(images)


# -- what can be switched on ---------------------------------------------------------------------------------


def lora(denoiser: Any, seed: int = 5, rank: int = 2) -> LoraConfig:
    torch.manual_seed(seed)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    return LoraConfig(r=rank, lora_alpha=4, init_lora_weights=False, target_modules=targets)


def save_lora(folder: Path, family: str = "sd15", seed: int = 5, rank: int = 2) -> Path:
    """A LoRA as people download it: a folder with a safetensors file."""
    pipe = TINY_PIPELINES[family].build()
    name = TINY_PIPELINES[family].denoisers[0]
    denoiser = getattr(pipe, name)
    denoiser.add_adapter(lora(denoiser, seed, rank))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(denoiser))
    type(pipe).save_lora_weights(folder, **{f"{name}_lora_layers": layers})
    return folder


def ip_adapter_weights(denoiser: Any) -> dict[str, Any]:
    """As IP-Adapter files have them: an image projection, and keys and values per cross-attention."""
    generator = torch.Generator().manual_seed(8)
    width = denoiser.config.cross_attention_dim

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    projection = {
        "proj.weight": randn(4 * width, 6), "proj.bias": randn(4 * width),
        "norm.weight": randn(width), "norm.bias": randn(width),
    }  # fmt: skip
    attention, number = {}, 1
    for name, module in denoiser.named_modules():
        if name.endswith("attn2"):
            attention[f"{number}.to_k_ip.weight"] = randn(module.to_k.out_features, width)
            attention[f"{number}.to_v_ip.weight"] = randn(module.to_v.out_features, width)
            number += 2
    return {"image_proj": projection, "ip_adapter": attention}


def load_ip_adapter(pipe: Any) -> None:
    weights = ip_adapter_weights(pipe.unet)
    pipe.load_ip_adapter(weights, subfolder="", weight_name="", image_encoder_folder=None)
    pipe.set_ip_adapter_scale(0.7)


def load_textual_inversion(pipe: Any) -> None:
    embedding = torch.randn(1, 8, generator=torch.Generator().manual_seed(4))
    pipe.load_textual_inversion({"<thing>": embedding})


def tile_vae(pipe: Any) -> None:
    pipe.vae.enable_tiling()
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 64, 8


def enable_freeu(pipe: Any) -> None:
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


class Louder(ModelHook):
    """What a user may write with diffusers' hooks. Counts its calls in this process."""

    calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict]:
        type(self).calls += 1
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return (output[0] * 1.1, *output[1:]) if isinstance(output, tuple) else output * 1.1


def hook_denoiser(pipe: Any) -> None:
    HookRegistry.check_if_exists_or_initialize(pipe.unet).register_hook(Louder(), "louder")


def unhook_denoiser(pipe: Any) -> None:
    pipe.unet._diffusers_hook.remove_hook("louder", recurse=False)


def hook_inner_module(pipe: Any) -> None:
    HookRegistry.check_if_exists_or_initialize(pipe.unet.mid_block).register_hook(Louder(), "louder")


def cast_layers(pipe: Any) -> None:
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


def has_processor(kind: type) -> Callable[[nn.Module], bool]:
    return lambda module: any(type(getattr(m, "processor", None)) is kind for m in module.modules())


def attention_backend(module: nn.Module) -> set[Any]:
    processors = [getattr(m, "processor", None) for m in module.modules()]
    return {p._attention_backend for p in processors if hasattr(p, "_attention_backend")}


def compile_blocks(pipe: Any) -> None:
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    denoiser.compile_repeated_blocks(backend="aot_eager", dynamic=False)


def is_compiled(module: nn.Module) -> bool:
    return any(isinstance(vars(child).get("forward"), CompiledForward) or _is_below_stub(child)
               for child in module.modules())  # fmt: skip


def _is_below_stub(module: nn.Module) -> bool:
    return isinstance(getattr(vars(module).get("forward"), "previous", None), CompiledForward)


def channels_last(pipe: Any) -> None:
    pipe.unet.to(memory_format=torch.channels_last)


def is_channels_last(module: nn.Module) -> bool:
    weights = [m.weight for m in module.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    held = [weight for weight in weights if weight.device.type != "meta" and weight.stride() != (0,) * 4]
    return bool(held) and all(weight.is_contiguous(memory_format=torch.channels_last) for weight in held)


# -- pipelines of the same components ------------------------------------------------------------------------


def img2img(pipe: Any) -> Any:
    return quiet(StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False))


def inpainting(pipe: Any) -> Any:
    return quiet(StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False))


def t2i_adapter(pipe: Any) -> Any:
    torch.manual_seed(3)
    adapter = T2IAdapter(channels=[8, 16], num_res_blocks=1, downscale_factor=8, adapter_type="full_adapter")
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    return quiet(
        StableDiffusionAdapterPipeline(**parts, adapter=adapter.eval(), requires_safety_checker=False)
    )


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


@of_call
def picture(call: TinyCall) -> Image.Image:
    noise = torch.rand(64, 64, 3, generator=torch.Generator().manual_seed(40 + call.seed))
    return Image.fromarray((noise * 255).byte().numpy())


@of_call
def half_masked(call: TinyCall) -> Image.Image:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    return mask


@of_call
def two_generators(call: TinyCall) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(call.seed + i) for i in range(2)]


@of_call
def prompt_embeddings(call: TinyCall) -> torch.Tensor:
    return call.randn(1, 16, 8)


@of_call
def image_embeddings(call: TinyCall) -> list[torch.Tensor]:
    return [call.randn(2, 1, 6)]


# -- callbacks -----------------------------------------------------------------------------------------------


def darken(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    return {"latents": tensors["latents"] * 0.95}


def stop_guidance(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """As diffusers' documentation does it: half the batch from then on."""
    if step != 2:
        return {}
    pipe._guidance_scale = 0.0
    return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[-1]}


def interrupt(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    pipe._interrupt = step >= 3
    return {}


COMBINATIONS = [
    Combination("img2img", of=img2img, arguments={"image": picture, "strength": 0.7}, steps=8),
    Combination("inpainting", of=inpainting,
                arguments={"image": picture, "mask_image": half_masked, "strength": 0.8}, steps=8),
    Combination("t2i-adapter", of=t2i_adapter,
                arguments={"image": picture, "adapter_conditioning_scale": 0.9}),
    Combination("controlnet-scale", "controlnet-sd15",
                arguments={"controlnet_conditioning_scale": 0.5, "control_guidance_end": 0.6}),
    Combination("latents-changed-by-a-callback", arguments={"callback_on_step_end": darken}),
    Combination("guidance-stopped-by-a-callback", steps=8, arguments={
        "callback_on_step_end": stop_guidance,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    }),
    Combination("interrupted", arguments={"callback_on_step_end": interrupt}),
    Combination("decoded", arguments={"output_type": "pt"}),
    Combination("vae-tiling", arguments={"output_type": "pt", "height": 128, "width": 128},
                switch_on=tile_vae, switch_off=lambda pipe: pipe.vae.disable_tiling()),
    Combination("two-pictures", arguments={"num_images_per_prompt": 2, "generator": two_generators}),
    Combination("prompt-embeddings", arguments={
        "prompt": None, "prompt_embeds": prompt_embeddings, "negative_prompt_embeds": prompt_embeddings,
    }),
    Combination("clip-skip", "sdxl", arguments={"clip_skip": 1}),
    Combination("guidance-rescale", arguments={"guidance_rescale": 0.7}),
    Combination("own-timesteps", "sdxl", arguments={"timesteps": [901, 801, 601, 401, 201, 1]}),
    Combination("textual-inversion", arguments={"prompt": "<thing>"}, switch_on=load_textual_inversion,
                switch_off=lambda pipe: pipe.unload_textual_inversion()),
    Combination("ip-adapter", arguments={"ip_adapter_image_embeds": image_embeddings},
                switch_on=load_ip_adapter, switch_off=lambda pipe: pipe.unload_ip_adapter()),
    Combination("freeu", switch_on=enable_freeu, switch_off=lambda pipe: pipe.disable_freeu()),
]  # fmt: skip
COMPUTED_OTHERWISE = [
    Combination("fused-projections", switch_on=lambda pipe: pipe.fuse_qkv_projections(vae=False),
                is_seen=lambda module: any(getattr(m, "fused_projections", False) for m in module.modules())),
    Combination("attention-processor", switch_on=lambda pipe: pipe.unet.set_attn_processor(AttnProcessor()),
                is_seen=has_processor(AttnProcessor)),
    Combination("attention-slicing", switch_on=lambda pipe: pipe.enable_attention_slicing(1),
                switch_off=lambda pipe: pipe.disable_attention_slicing(),
                is_seen=has_processor(SlicedAttnProcessor)),
    Combination("attention-backend", "flux",
                switch_on=lambda pipe: pipe.transformer.set_attention_backend("_native_math"),
                switch_off=lambda pipe: pipe.transformer.set_attention_backend("native"),
                is_seen=lambda module: attention_backend(module) == {"_native_math"}),
    Combination("channels-last", switch_on=channels_last, is_seen=is_channels_last),
    Combination("compiled-blocks", switch_on=compile_blocks, is_seen=is_compiled),
    Combination("compiled-flux-blocks", "flux", switch_on=compile_blocks, is_seen=is_compiled),
]  # fmt: skip
ALL = [*COMBINATIONS, *COMPUTED_OTHERWISE]


def ids(combinations: list[Combination]) -> list[Any]:
    return [pytest.param(combination, id=combination.name) for combination in combinations]


@pytest.fixture(autouse=True)
def _attention_backend_as_before() -> Iterator[None]:
    """`set_attention_backend` also sets a default for the whole process."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    yield
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


def stages(handle: Handle) -> list[nn.Module]:
    """The modules of the local executor's stages."""
    return [replica.module for each in handle._division.installations
            for replica in each.executor._replicas.values()]  # fmt: skip


@pytest.mark.parametrize("combination", ids(ALL))
def test_combination_is_bitwise_in_order_and_stays_when_stale(combination: Combination) -> None:
    """Switched on before `parallelize`."""
    pipe = combination.build()
    without = replace(combination, arguments=combination.needed).make(pipe)
    if combination.switch_on is not None:
        combination.switch_on(pipe)
    exact = combination.make(pipe)
    if combination.is_seen is None and combination.of is None:
        assert not torch.equal(exact, without), "the combination changes nothing"
    with asyncdiff.parallelize(pipe, num_stages=2, warmup_steps=IN_ORDER) as handle:
        assert torch.equal(combination.make(pipe), exact)
        if combination.is_seen is not None:
            assert all(combination.is_seen(module) for module in stages(handle))
        handle.set(warmup_steps=STALE)
        stale = combination.make(pipe)
        assert stale.float().isfinite().all()
        assert not torch.equal(stale, exact)
        assert torch.equal(combination.make(pipe), stale)
    assert torch.equal(combination.make(pipe), exact)


@pytest.mark.parametrize(
    "combination",
    [
        *ids([c for c in COMBINATIONS if c.switch_on is not None]),
        *(pytest.param(c, id=c.name, marks=pytest.mark.wide) for c in COMPUTED_OTHERWISE),
    ],
)
def test_combination_may_be_switched_on_and_off_while_divided(combination: Combination) -> None:
    plain = replace(combination, arguments={})
    pipe = combination.build()
    without = plain.make(pipe)
    combination.switch_on(pipe)
    exact = combination.make(pipe)
    if combination.switch_off is not None:
        combination.switch_off(pipe)  # what it has set for the whole process
    pipe = combination.build()
    with asyncdiff.parallelize(pipe, num_stages=2, warmup_steps=IN_ORDER) as handle:
        assert torch.equal(plain.make(pipe), without)
        combination.switch_on(pipe)
        assert torch.equal(combination.make(pipe), exact)
        if combination.is_seen is not None:
            assert all(combination.is_seen(module) for module in stages(handle))
        if combination.switch_off is not None:
            combination.switch_off(pipe)
            assert torch.equal(plain.make(pipe), without)


# -- LoRA ----------------------------------------------------------------------------------------------------


def change_adapters(pipe: Any, first: Path, second: Path) -> Iterator[None]:
    """What people do with adapters, one change at a time."""
    pipe.load_lora_weights(first, adapter_name="first")
    yield
    pipe.load_lora_weights(second, adapter_name="second")
    pipe.set_adapters(["first", "second"], [0.7, 0.4])
    yield
    pipe.set_adapters("second")
    yield
    pipe.disable_lora()
    yield
    pipe.enable_lora()
    pipe.delete_adapters("first")
    yield
    pipe.fuse_lora(lora_scale=0.5)
    yield
    pipe.unfuse_lora()
    yield
    pipe.unload_lora_weights()
    yield


def pictures_of_changes(pipe: Any, family: str, first: Path, second: Path) -> list[torch.Tensor]:
    call = TinyCall(steps=4)
    changes = change_adapters(pipe, first, second)
    made = [generate(TINY_PIPELINES[family], pipe, call)]
    return made + [generate(TINY_PIPELINES[family], pipe, call) for _ in changes]


@pytest.mark.parametrize(
    ("family", "devices"),
    [
        ("sd15", None),
        pytest.param("sd3", None, marks=pytest.mark.wide),
        pytest.param("flux", None, marks=pytest.mark.wide),
        pytest.param("sd15", 2, marks=pytest.mark.wide),
        pytest.param("flux", 2, marks=pytest.mark.wide),
    ],
)
def test_adapters_may_be_changed_while_divided(family: str, devices: int | None, tmp_path: Path) -> None:
    first, second = (save_lora(tmp_path / str(seed), family, seed, rank=seed - 3) for seed in (5, 6))
    exact = pictures_of_changes(TINY_PIPELINES[family].build(), family, first, second)
    assert not any(starmap(torch.equal, pairwise(exact[:7]))), "an adapter changes nothing"
    pipe = TINY_PIPELINES[family].build()
    denoiser = getattr(pipe, TINY_PIPELINES[family].denoisers[0])
    with asyncdiff.parallelize(pipe, devices, num_stages=2, warmup_steps=IN_ORDER):
        made = pictures_of_changes(pipe, family, first, second)
    assert [torch.equal(a, b) for a, b in zip(made, exact, strict=True)] == [True] * len(exact)
    assert all(tensor.device.type != "meta" for tensor in denoiser.state_dict().values())


def test_adapter_may_be_loaded_before_the_first_run_and_in_the_middle_of_one(tmp_path: Path) -> None:
    """And what is loaded in a worker is what is loaded here: two processes are bitwise one."""
    folder = save_lora(tmp_path)

    def change(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            pipe.set_adapters("early", 0.3)
        if step == 3:
            pipe.load_lora_weights(folder, adapter_name="late")
        return {}

    def make(devices: int | None, warmup_steps: int | None) -> list[torch.Tensor]:
        pipe = TINY_PIPELINES["sd15"].build()
        call = TinyCall(steps=STEPS)
        handle = None
        if warmup_steps is not None:
            handle = asyncdiff.parallelize(pipe, devices, num_stages=2, warmup_steps=warmup_steps)
        pipe.load_lora_weights(folder, adapter_name="early")
        made = [generate(TINY_PIPELINES["sd15"], pipe, call, callback_on_step_end=change)]
        made.append(generate(TINY_PIPELINES["sd15"], pipe, call))
        if handle is not None:
            assert len(handle.last_run.steps) == EVALUATIONS
            handle.remove()
        return made

    exact, stale = make(None, None), make(None, STALE)
    assert not torch.equal(*exact)
    assert all(map(torch.equal, make(None, IN_ORDER), exact))
    assert not any(map(torch.equal, stale, exact))
    assert all(map(torch.equal, make(2, STALE), stale))


def test_scale_of_an_adapter_may_differ_from_call_to_call(tmp_path: Path) -> None:
    pipe = TINY_PIPELINES["sdxl"].build()
    pipe.load_lora_weights(save_lora(tmp_path, "sdxl"))

    def make(scale: float) -> torch.Tensor:
        return generate(TINY_PIPELINES["sdxl"], pipe, cross_attention_kwargs={"scale": scale})

    exact = {scale: make(scale) for scale in (1.0, 0.3)}
    assert not torch.equal(*exact.values())
    with asyncdiff.parallelize(pipe, num_stages=2, warmup_steps=IN_ORDER):
        for scale in (1.0, 0.3, 1.0):
            assert torch.equal(make(scale), exact[scale])


def test_scale_of_an_image_prompt_may_change_in_the_middle_of_a_run() -> None:
    def fade(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            pipe.set_ip_adapter_scale(0.2)
        return {}

    combination = next(c for c in COMBINATIONS if c.name == "ip-adapter")
    fading = replace(combination, arguments=combination.arguments | {"callback_on_step_end": fade})
    pipe = combination.build()
    load_ip_adapter(pipe)
    steady, exact = combination.make(pipe), None
    exact = fading.make(pipe)
    assert not torch.equal(exact, steady)
    pipe.set_ip_adapter_scale(0.7)
    with asyncdiff.parallelize(pipe, num_stages=2, warmup_steps=IN_ORDER):
        assert torch.equal(fading.make(pipe), exact)


# -- several pipelines and runs ------------------------------------------------------------------------------


def test_refiner_goes_on_where_the_base_stops() -> None:
    base = TINY_PIPELINES["sdxl"].build()
    refiner = quiet(StableDiffusionXLImg2ImgPipeline(**TINY_PIPELINES["sdxl"].build().components))
    arguments = TINY_PIPELINES["sdxl"].arguments(TinyCall(steps=10))
    size = {"height", "width", "generator"}

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        latents = base(**arguments | {"denoising_end": 0.5, "generator": generator}).images
        rest = {name: value for name, value in arguments.items() if name not in size}
        return latents, refiner(**rest, image=latents, denoising_start=0.5, generator=generator).images

    exact = make()
    assert not torch.equal(*exact)
    with (
        asyncdiff.parallelize(base, num_stages=2, warmup_steps=IN_ORDER) as first,
        asyncdiff.parallelize(refiner, num_stages=2, warmup_steps=IN_ORDER) as second,
    ):
        assert all(map(torch.equal, make(), exact))
        assert (len(first.last_run.steps), len(second.last_run.steps)) == (5, 5)
        first.set(warmup_steps=STALE)
        second.set(warmup_steps=STALE)
        stale = make()
        assert not any(map(torch.equal, stale, exact))
        assert all(map(torch.equal, make(), stale))


def test_run_after_an_interrupted_one_knows_nothing_of_it() -> None:
    whole = Combination("whole")
    stopped = Combination("stopped", arguments={"callback_on_step_end": interrupt})
    pipe = whole.build()
    with asyncdiff.parallelize(pipe, num_stages=2):
        fresh = whole.make(pipe)
        assert not torch.equal(stopped.make(pipe), fresh)
        assert torch.equal(whole.make(pipe), fresh)


# -- hooks ---------------------------------------------------------------------------------------------------


@pytest.fixture
def _no_calls_of_hooks() -> None:
    Louder.calls = 0


@pytest.mark.usefixtures("_no_calls_of_hooks")
@pytest.mark.parametrize("when", ["before", "after"])
def test_hook_of_diffusers_on_the_denoiser_runs_once_a_step_in_the_driver(when: str) -> None:
    combination = Combination("hooked", switch_on=hook_denoiser, switch_off=unhook_denoiser)
    pipe = combination.build()
    without = combination.make(pipe)
    hook_denoiser(pipe)
    exact, Louder.calls = combination.make(pipe), 0
    assert not torch.equal(exact, without)
    if when == "after":
        unhook_denoiser(pipe)
    handle = asyncdiff.parallelize(pipe, num_stages=2, warmup_steps=IN_ORDER)
    if when == "after":
        assert torch.equal(combination.make(pipe), without)
        hook_denoiser(pipe)
    assert torch.equal(combination.make(pipe), exact)
    assert Louder.calls == EVALUATIONS
    if when == "before":
        unhook_denoiser(pipe)
        assert torch.equal(combination.make(pipe), without)
        hook_denoiser(pipe)
    handle.remove()
    assert torch.equal(combination.make(pipe), exact)
    unhook_denoiser(pipe)
    assert torch.equal(combination.make(pipe), without)


@pytest.mark.parametrize("devices", [None, 2])
def test_hook_of_torch_on_the_denoiser_runs_once_a_step_in_the_driver(devices: int | None) -> None:
    """A closure, too, which no other process could get."""
    calls = []

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        calls.append("before")
        return args, kwargs

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        calls.append("after")
        return tuple(leaf * 1.1 for leaf in output)

    plain = Combination("plain")
    pipe = plain.build()
    without = plain.make(pipe)
    pipe.unet.register_forward_pre_hook(before, with_kwargs=True)
    pipe.unet.register_forward_hook(after)
    exact = plain.make(pipe)
    assert not torch.equal(exact, without)
    calls.clear()
    with asyncdiff.parallelize(pipe, devices, num_stages=2, warmup_steps=IN_ORDER):
        assert torch.equal(plain.make(pipe), exact)
    assert calls == ["before", "after"] * EVALUATIONS


def louder(module: nn.Module, args: Any, output: Any) -> Any:
    """A hook that other processes can import."""
    Louder.calls += 1
    return tuple(leaf * 1.1 for leaf in output) if isinstance(output, tuple) else output * 1.1


@pytest.mark.usefixtures("_no_calls_of_hooks")
@pytest.mark.parametrize("path", ["mid_block", "conv_out", "down_blocks.0.attentions.0"])
def test_hook_of_torch_inside_the_denoiser_runs_where_its_module_does(path: str) -> None:
    """And only there: once a step, not once per stage. (One that is cut runs in part in each.)"""
    plain = Combination("plain")
    pipe = plain.build()
    without = plain.make(pipe)
    hook = pipe.unet.get_submodule(path).register_forward_hook(louder)
    exact = plain.make(pipe)
    assert not torch.equal(exact, without)
    partition = [
        ["conv_in", "down_blocks"],
        ["mid_block", "up_blocks", "conv_norm_out", "conv_act", "conv_out"],
    ]
    with asyncdiff.parallelize(pipe, num_stages=2, warmup_steps=IN_ORDER, partition=partition):
        plain.make(pipe)  # the first denoiser call is also recorded
        Louder.calls = 0
        assert torch.equal(plain.make(pipe), exact)
        assert Louder.calls == EVALUATIONS
        hook.remove()
        assert torch.equal(plain.make(pipe), without)


@pytest.mark.parametrize("switch_on", [hook_inner_module, cast_layers])
def test_hook_of_diffusers_inside_the_denoiser_runs_with_its_module(switch_on: Change) -> None:
    combination = Combination("hooked", switch_on=switch_on)
    pipe = combination.build()
    without = combination.make(pipe)
    switch_on(pipe)
    exact = combination.make(pipe)
    assert not torch.equal(exact, without)
    with asyncdiff.parallelize(pipe, num_stages=2, warmup_steps=IN_ORDER) as handle:
        assert torch.equal(combination.make(pipe), exact)
        hooks = [hook for module in stages(handle) for child in module.modules()
                 for hook in getattr(vars(child).get("_diffusers_hook"), "hooks", {}).values()]  # fmt: skip
        assert {type(hook) for hook in hooks} <= {Louder, LayerwiseCastingHook}
        assert hooks
        handle.set(warmup_steps=STALE)
        assert not torch.equal(combination.make(pipe), exact)
    assert torch.equal(combination.make(pipe), exact)


# -- in processes --------------------------------------------------------------------------------------------

TRAVELLING = [c for c in ALL if c.name in (
    "ip-adapter", "freeu", "fused-projections", "attention-slicing", "attention-backend", "channels-last",
    "compiled-flux-blocks",
)]  # fmt: skip
TOLD_BEFORE = [
    *(c for c in ALL if c.name in ("t2i-adapter", "guidance-stopped-by-a-callback")),
    Combination("layerwise-casting", switch_on=cast_layers),
]


@pytest.mark.wide
@pytest.mark.parametrize(
    ("combination", "when"),
    [
        pytest.param(combination, when, id=f"{combination.name}-{when}")
        for combinations, when in ((TRAVELLING, "before"), (TOLD_BEFORE, "before"), (TRAVELLING, "after"))
        for combination in combinations
    ],
)
def test_two_processes_are_bitwise_the_local_executor(combination: Combination, when: str) -> None:
    made = []
    for devices in (None, 2):
        pipe = combination.build()
        if when == "before" and combination.switch_on is not None:
            combination.switch_on(pipe)
        with asyncdiff.parallelize(pipe, devices, num_stages=2):
            if when == "after" and combination.switch_on is not None:
                replace(combination, arguments={}).make(pipe)
                combination.switch_on(pipe)
            made.append(combination.make(pipe))
        if combination.switch_off is not None:
            combination.switch_off(pipe)
    assert torch.equal(*made)


# -- quantised weights ---------------------------------------------------------------------------------------


def quantise_with_torchao(denoiser: nn.Module) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(denoiser, quantization.Int8WeightOnlyConfig())


def quantise_with_bitsandbytes(denoiser: nn.Module) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for name, layer in _linear_layers(denoiser).items():
        quantised = bitsandbytes.nn.Linear4bit(
            layer.in_features, layer.out_features, layer.bias is not None, torch.float32, quant_type="nf4"
        )
        quantised.load_state_dict(layer.state_dict())
        denoiser.set_submodule(name, quantised.to("cpu"))


def quantise_as_gguf(denoiser: nn.Module) -> None:
    """As `from_single_file` leaves a GGUF file's weights."""
    gguf = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = gguf.GGMLQuantizationType.Q8_0
    for name, layer in _linear_layers(denoiser).items():
        quantised = GGUFLinear(layer.in_features, layer.out_features, layer.bias is not None, torch.float32)
        data = torch.from_numpy(gguf.quants.quantize(layer.weight.detach().numpy(), kind))
        quantised.weight, quantised.bias = GGUFParameter(data, quant_type=kind), layer.bias
        denoiser.set_submodule(name, quantised)


def _linear_layers(denoiser: nn.Module) -> dict[str, nn.Linear]:
    return {
        name: layer
        for name, layer in denoiser.named_modules()
        if type(layer) is nn.Linear and "blocks" in name and layer.in_features % 32 == 0
    }


@pytest.mark.parametrize("devices", [None, pytest.param(2, marks=pytest.mark.wide)])
@pytest.mark.parametrize("quantise", [quantise_with_torchao, quantise_with_bitsandbytes, quantise_as_gguf])
def test_quantised_weights_are_divided_as_they_are(quantise: Change, devices: int | None) -> None:
    family = TINY_PIPELINES["flux"]
    pipe = family.build()
    calls = (TinyCall(), TinyCall(seed=1, large=True))
    plain = generate(family, pipe, calls[0])
    quantise(pipe.transformer)
    exact = [generate(family, pipe, call) for call in calls]
    assert not torch.equal(exact[0], plain)
    weight = pipe.transformer.transformer_blocks[0].attn.to_q.weight
    with asyncdiff.parallelize(pipe, devices, num_stages=2, warmup_steps=IN_ORDER) as handle:
        for call, expected in zip(calls, exact, strict=True):
            assert torch.equal(generate(family, pipe, call), expected), call
        if devices is not None:
            whole = sum(tensor.nbytes for _, tensor in named_tensors(pipe.transformer))
            assert all(0 < held < whole for held in handle.last_run.weight_bytes)
        handle.set(warmup_steps=STALE)
        assert not torch.equal(generate(family, pipe, calls[0]), exact[0])
    assert type(pipe.transformer.transformer_blocks[0].attn.to_q.weight) is type(weight)
    assert torch.equal(generate(family, pipe, calls[0]), exact[0])
