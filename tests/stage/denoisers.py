"""Tiny configurations of real diffusers classes with the inputs their pipelines give them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import nn

from asyncdiff.pipeline.denoiser import capture_call
from asyncdiff.tiny import TINY_PIPELINES, TinyCall
from asyncdiff.tiny.parts import random_weights
from asyncdiff.trace import flatten_inputs


@dataclass(frozen=True)
class Case:
    """A denoiser class, and inputs for a batch and a latent size. `mode`: what its trace needs."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], dict[str, Any]]
    mode: str = "fake"


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def build(case: Case, seed: int = 0) -> nn.Module:
    """The denoiser in eval mode with every weight random: a zero-initialised layer would hide a wrong
    wire."""
    return random_weights(case.build, seed)


def unet_sd15(**changes: Any) -> nn.Module:
    config: dict[str, Any] = {
        "sample_size": 16, "block_out_channels": (8, 16, 16, 16), "layers_per_block": 2, "norm_num_groups": 4,
        "cross_attention_dim": 8, "attention_head_dim": 2,
    }  # fmt: skip
    return diffusers.UNet2DConditionModel(**(config | changes))


def unet_inputs(batch: int, size: int) -> dict[str, Any]:
    return {
        "sample": randn(batch, 4, size, size),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": randn(batch, 5, 8),
        "return_dict": False,
    }


def unet_sdxl() -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=(2, 4, 4), transformer_layers_per_block=(1, 2, 3), use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=32,
    )  # fmt: skip


def sdxl_inputs(batch: int, size: int) -> dict[str, Any]:
    added = {"text_embeds": randn(batch, 8), "time_ids": randn(batch, 6)}
    return unet_inputs(batch, size) | {"added_cond_kwargs": added}


def unet_small(**changes: Any) -> nn.Module:
    """Like `unet_sd15`, with three levels of one layer."""
    return unet_sd15(
        block_out_channels=(8, 16, 16), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        **changes,
    )  # fmt: skip


def unet_skip_shapes(batch: int, size: int) -> list[tuple[int, ...]]:
    """Shapes of the skip connections of `unet_small`."""
    channels, scales = (8, 8, 8, 16, 16, 16), (1, 1, 2, 2, 4, 4)
    return [(batch, c, size // s, size // s) for c, s in zip(channels, scales, strict=True)]


def controlnet_inputs(batch: int, size: int) -> dict[str, Any]:
    shapes = unet_skip_shapes(batch, size)
    return unet_inputs(batch, size) | {
        "down_block_additional_residuals": tuple(randn(*shape) for shape in shapes),
        "mid_block_additional_residual": randn(*shapes[-1]),
    }


def t2i_adapter_inputs(batch: int, size: int) -> dict[str, Any]:
    shapes = [(batch, 8, size, size), (batch, 16, size // 2, size // 2), (batch, 16, size // 4, size // 4)]
    return unet_inputs(batch, size) | {
        "down_intrablock_additional_residuals": [randn(*shape) for shape in shapes]
    }


def unet_freeu() -> nn.Module:
    module = unet_small()
    module.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    return module


def dit() -> nn.Module:
    return diffusers.DiTTransformer2DModel(
        sample_size=16, num_layers=4, patch_size=2, attention_head_dim=4, num_attention_heads=2,
        in_channels=4,
        out_channels=8, num_embeds_ada_norm=8, norm_type="ada_norm_zero", attention_bias=True,
        activation_fn="gelu-approximate", norm_elementwise_affine=False,
    )  # fmt: skip


def dit_inputs(batch: int, size: int) -> dict[str, Any]:
    return {
        "hidden_states": randn(batch, 4, size, size),
        "timestep": torch.full((batch,), 5),
        "class_labels": torch.arange(batch) % 8,
        "return_dict": False,
    }


def unet2d() -> nn.Module:
    return diffusers.UNet2DModel(
        sample_size=16, in_channels=3, out_channels=3, block_out_channels=(8, 16, 16), layers_per_block=1,
        norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def unet2d_inputs(batch: int, size: int) -> dict[str, Any]:
    return {"sample": randn(batch, 3, size, size), "timestep": torch.tensor(500)}


def wan() -> nn.Module:
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=8,
        freq_dim=8, ffn_dim=16, num_layers=4, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )  # fmt: skip


def wan_inputs(batch: int, size: int) -> dict[str, Any]:
    return {
        "hidden_states": randn(batch, 4, 2, size, size),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": randn(batch, 5, 8),
        "return_dict": False,
    }


def of_family(name: str, family: str, mode: str = "fake") -> Case:
    """The denoiser of a tiny pipeline, and what the pipeline hands it in its first call."""
    tiny = TINY_PIPELINES[family]

    def inputs(batch: int, size: int) -> dict[str, Any]:
        pipe = tiny.build()
        denoiser = getattr(pipe, tiny.denoisers[0])
        args, kwargs = capture_call(pipe, [denoiser], tiny.arguments(TinyCall(batch=batch, large=size > 16)))
        return flatten_inputs(type(denoiser).forward, args, kwargs).rebuild()

    return Case(name, lambda: getattr(tiny.build(), tiny.denoisers[0]), inputs, mode)


CASES = (
    Case("SD1.5", unet_sd15, unet_inputs),
    Case("SD2.1", lambda: unet_small(use_linear_projection=True, attention_head_dim=(1, 2, 4)), unet_inputs),
    Case("SDXL", unet_sdxl, sdxl_inputs),
    Case("SD1.5+ControlNet", unet_small, controlnet_inputs),
    Case("SD1.5+T2I-Adapter", unet_small, t2i_adapter_inputs),
    Case("SD1.5+FreeU", unet_freeu, unet_inputs),
    of_family("SD3", "sd35"),
    of_family("Flux", "flux"),
    of_family("Flux2", "flux2"),
    of_family("Chroma", "chroma"),
    of_family("AuraFlow", "aura-flow"),
    of_family("CogView4", "cogview4"),
    of_family("Sana", "sana"),
    of_family("HunyuanDiT", "hunyuan-dit"),
    of_family("PixArt", "pixart-alpha"),
    Case("DiT", dit, dit_inputs),
    Case("UNet2D", unet2d, unet2d_inputs),
    Case("Wan", wan, wan_inputs),
    of_family("QwenImage", "qwen-image"),
    of_family("Z-Image", "z-image"),
    of_family("Lumina2", "lumina2", mode="mixed"),
    of_family("OmniGen", "omnigen", mode="mixed"),
    of_family("HiDream", "hidream", mode="hollow"),
)
BY_NAME = {case.name: case for case in CASES}
