"""Adapters, FreeU, attention processors and extra inputs: followed where possible, refused by name where
not."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from peft import LoraConfig
from random_pipelines import WIDTH, generate, sd, sd3, sdxl, unet

import asyncdiff

pytestmark = pytest.mark.filterwarnings("ignore::asyncdiff.pipeline.user_warning.AsyncDiffWarning")

IN_ORDER = {"num_stages": 2, "warmup_steps": 99}


def add_lora(module: Any, seed: int = 5) -> None:
    torch.manual_seed(seed)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    module.add_adapter(LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=targets))


@pytest.mark.parametrize("build", [sd, sdxl, sd3])
def test_lora_loaded_before_is_divided_too(build: Any) -> None:
    pipe = build()
    without = generate(pipe)
    add_lora(pipe.transformer if build is sd3 else pipe.unet)
    exact = generate(pipe)
    assert not torch.equal(exact, without)
    with asyncdiff.parallelize(pipe, **IN_ORDER):
        assert torch.equal(generate(pipe), exact)


def test_lora_scale_may_differ_from_call_to_call() -> None:
    pipe = sdxl()
    add_lora(pipe.unet)
    exact = {scale: generate(pipe, cross_attention_kwargs={"scale": scale}) for scale in (1.0, 0.3)}
    assert not torch.equal(*exact.values())
    with asyncdiff.parallelize(pipe, **IN_ORDER):
        for scale in (1.0, 0.3, 1.0):
            assert torch.equal(generate(pipe, cross_attention_kwargs={"scale": scale}), exact[scale])


def test_adapter_switched_off_between_runs_is_followed() -> None:
    pipe = sd()
    without = generate(pipe)
    add_lora(pipe.unet)
    exact = generate(pipe)
    with asyncdiff.parallelize(pipe, **IN_ORDER):
        assert torch.equal(generate(pipe), exact)
        pipe.unet.disable_adapters()
        assert torch.equal(generate(pipe), without)


def test_lora_added_after_is_followed() -> None:
    pipe = sd()
    add_lora(pipe.unet)
    exact = generate(pipe)
    pipe = sd()
    with asyncdiff.parallelize(pipe, **IN_ORDER):
        assert not torch.equal(generate(pipe), exact)
        add_lora(pipe.unet)
        assert torch.equal(generate(pipe), exact)


def test_weights_added_behind_our_back_are_refused_by_name() -> None:
    pipe = sd()
    with asyncdiff.parallelize(pipe, **IN_ORDER):
        generate(pipe)
        type(pipe.unet).add_adapter(pipe.unet, LoraConfig(r=2, target_modules=["to_q"]))
        with pytest.raises(
            asyncdiff.ParallelizedError, match=r"weights were changed.*lora_A.*handle\.remove\(\)"
        ):
            generate(pipe)


def test_freeu_between_runs_is_followed() -> None:
    pipe = sd()
    without = generate(pipe)
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    exact = generate(pipe)
    pipe.disable_freeu()
    with asyncdiff.parallelize(pipe, **IN_ORDER):
        assert torch.equal(generate(pipe), without)
        pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
        assert torch.equal(generate(pipe), exact)
        pipe.disable_freeu()
        assert torch.equal(generate(pipe), without)


def test_attention_processor_between_runs_is_followed() -> None:
    pipe = sd()
    pipe.unet.set_attn_processor(AttnProcessor())
    exact = generate(pipe)
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    with asyncdiff.parallelize(pipe, **IN_ORDER) as handle:
        generate(pipe)
        pipe.unet.set_attn_processor(AttnProcessor())
        assert torch.equal(generate(pipe), exact)
        module = handle._division.installations[0].executor._replicas[0].module
        assert all(isinstance(processor, AttnProcessor) for processor in module.attn_processors.values())


def test_controlnet_residuals_reach_their_stages() -> None:
    torch.manual_seed(2)
    denoiser = unet()
    controlnet = diffusers.ControlNetModel.from_unet(
        denoiser, conditioning_channels=3, load_weights_from_unet=False
    )
    with torch.no_grad():
        for parameter in controlnet.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    pipe = sd(diffusers.StableDiffusionControlNetPipeline, unet=denoiser, controlnet=controlnet.eval())
    # Its conditioning embedding shrinks the picture eight times, whatever the autoencoder does.
    picture = torch.rand(1, 3, 64, 64)
    controlnet.controlnet_cond_embedding.register_forward_pre_hook(lambda _, args: (args[0],))

    def make() -> torch.Tensor:
        return generate(pipe, image=picture, size=64)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipe, "vae_scale_factor", 8)
        exact = make()
        with asyncdiff.parallelize(pipe, num_stages=3, warmup_steps=99) as handle:
            assert torch.equal(make(), exact)
            handle.set(warmup_steps=1)
            assert not torch.equal(make(), exact)
    assert exact.shape[-1] == 8


def test_ip_adapter_embeddings_reach_their_stages() -> None:
    denoiser = unet()
    denoiser._load_ip_adapter_weights([_ip_adapter_weights(denoiser)])
    pipe = sd(unet=denoiser)
    embeddings = [torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(9))]
    exact = generate(pipe, ip_adapter_image_embeds=embeddings)
    with asyncdiff.parallelize(pipe, num_stages=2, warmup_steps=99) as handle:
        assert torch.equal(generate(pipe, ip_adapter_image_embeds=embeddings), exact)
        handle.set(warmup_steps=1)
        assert not torch.equal(generate(pipe, ip_adapter_image_embeds=embeddings), exact)


def _ip_adapter_weights(denoiser: Any) -> dict[str, Any]:
    """As IP-Adapter files have them: an image projection, and keys and values per cross-attention."""
    generator = torch.Generator().manual_seed(8)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    projection = {
        "proj.weight": randn(4 * WIDTH, 6), "proj.bias": randn(4 * WIDTH),
        "norm.weight": randn(WIDTH), "norm.bias": randn(WIDTH),
    }  # fmt: skip
    attention, number = {}, 1
    for name, module in denoiser.named_modules():
        if name.endswith("attn2"):
            attention[f"{number}.to_k_ip.weight"] = randn(module.to_k.out_features, WIDTH)
            attention[f"{number}.to_v_ip.weight"] = randn(module.to_v.out_features, WIDTH)
            number += 2
    return {"image_proj": projection, "ip_adapter": attention}
