"""Tiny configurations of real diffusers classes with the inputs their pipelines give them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import nn


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
    torch.manual_seed(seed)
    module = case.build().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.numel() > 1 and parameter.float().std() == 0:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


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


def sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=6, attention_head_dim=4,
        num_attention_heads=2,
        caption_projection_dim=8, joint_attention_dim=8, pooled_projection_dim=8, out_channels=4,
        pos_embed_max_size=16, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip


def sd3_inputs(batch: int, size: int) -> dict[str, Any]:
    return {
        "hidden_states": randn(batch, 4, size, size),
        "encoder_hidden_states": randn(batch, 5, 8),
        "pooled_projections": randn(batch, 8),
        "timestep": torch.full((batch,), 500.0),
        "return_dict": False,
    }


def flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=3, num_single_layers=4, attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip


def flux_inputs(batch: int, size: int) -> dict[str, Any]:
    tokens = size * size // 4
    return {
        "hidden_states": randn(batch, tokens, 4),
        "encoder_hidden_states": randn(batch, 5, 8),
        "pooled_projections": randn(batch, 8),
        "timestep": torch.full((batch,), 0.5),
        "guidance": torch.full((batch,), 3.5),
        "img_ids": torch.arange(tokens * 3).reshape(tokens, 3).float() % 7,
        "txt_ids": torch.zeros(5, 3),
        "return_dict": False,
    }


def hunyuan_dit() -> nn.Module:
    return diffusers.HunyuanDiT2DModel(
        sample_size=16, num_layers=6, patch_size=2, attention_head_dim=8, num_attention_heads=2,
        in_channels=4,
        cross_attention_dim=8, cross_attention_dim_t5=8, pooled_projection_dim=4, hidden_size=16, text_len=4,
        text_len_t5=4, activation_fn="gelu-approximate", norm_type="ada_norm_continous",
    )  # fmt: skip


def hunyuan_dit_inputs(batch: int, size: int) -> dict[str, Any]:
    tokens = (size // 2) ** 2
    return {
        "hidden_states": randn(batch, 4, size, size),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": randn(batch, 4, 8),
        "text_embedding_mask": torch.ones(batch, 4, dtype=torch.int64),
        "encoder_hidden_states_t5": randn(batch, 4, 8),
        "text_embedding_mask_t5": torch.ones(batch, 4, dtype=torch.int64),
        "image_meta_size": torch.full((batch, 6), 64.0),
        "style": torch.zeros(batch, dtype=torch.int64),
        "image_rotary_emb": [randn(tokens, 8), randn(tokens, 8)],
        "return_dict": False,
    }


def pixart() -> nn.Module:
    return diffusers.PixArtTransformer2DModel(
        sample_size=16, num_layers=4, patch_size=2, attention_head_dim=4, num_attention_heads=2,
        in_channels=4,
        cross_attention_dim=8, caption_channels=8, out_channels=8, norm_num_groups=1,
        use_additional_conditions=False,
    )  # fmt: skip


def pixart_inputs(batch: int, size: int) -> dict[str, Any]:
    return {
        "hidden_states": randn(batch, 4, size, size),
        "encoder_hidden_states": randn(batch, 5, 8),
        "encoder_attention_mask": torch.ones(batch, 5),
        "timestep": torch.full((batch,), 500),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }


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


def qwen_image() -> nn.Module:
    """Holds its rope frequencies as plain attributes, not buffers."""
    return diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=4, attention_head_dim=16,
        num_attention_heads=3, joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip


def qwen_image_inputs(batch: int, size: int) -> dict[str, Any]:
    side = size // 4
    return {
        "hidden_states": randn(batch, side * side, 16),
        "encoder_hidden_states": randn(batch, 7, 16),
        "encoder_hidden_states_mask": torch.ones(batch, 7, dtype=torch.long),
        "timestep": torch.full((batch,), 0.5),
        "img_shapes": [(1, side, side)] * batch,
        "return_dict": False,
    }


def z_image() -> nn.Module:
    return diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=16, dim=16, n_layers=3, n_refiner_layers=1,
        n_heads=1, n_kv_heads=2, cap_feat_dim=16, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip


def z_image_inputs(batch: int, size: int) -> dict[str, Any]:
    """Latents are a list with one tensor per sample."""
    return {
        "x": [randn(16, 1, size, size) for _ in range(batch)],
        "cap_feats": [randn(6, 16) for _ in range(batch)],
        "t": torch.full((batch,), 0.1),
    }


def lumina2() -> nn.Module:
    return diffusers.Lumina2Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, hidden_size=24, num_layers=3, num_refiner_layers=1,
        num_attention_heads=3, num_kv_heads=1, multiple_of=2, scaling_factor=1.0, axes_dim_rope=(4, 2, 2),
        axes_lens=(128, 128, 128), cap_feat_dim=32,
    )  # fmt: skip


def lumina2_inputs(batch: int, size: int) -> dict[str, Any]:
    return {
        "hidden_states": randn(batch, 4, size, size),
        "encoder_hidden_states": randn(batch, 10, 32),
        "timestep": torch.rand(batch),
        "encoder_attention_mask": torch.ones(batch, 10, dtype=torch.bool),
    }


CASES = (
    Case("SD1.5", unet_sd15, unet_inputs),
    Case("SD2.1", lambda: unet_small(use_linear_projection=True, attention_head_dim=(1, 2, 4)), unet_inputs),
    Case("SDXL", unet_sdxl, sdxl_inputs),
    Case("SD1.5+ControlNet", unet_small, controlnet_inputs),
    Case("SD1.5+T2I-Adapter", unet_small, t2i_adapter_inputs),
    Case("SD1.5+FreeU", unet_freeu, unet_inputs),
    Case("SD3", sd3, sd3_inputs),
    Case("Flux", flux, flux_inputs),
    Case("HunyuanDiT", hunyuan_dit, hunyuan_dit_inputs),
    Case("PixArt", pixart, pixart_inputs),
    Case("DiT", dit, dit_inputs),
    Case("UNet2D", unet2d, unet2d_inputs),
    Case("Wan", wan, wan_inputs),
    Case("QwenImage", qwen_image, qwen_image_inputs),
    Case("Z-Image", z_image, z_image_inputs),
    Case("Lumina2", lumina2, lumina2_inputs, mode="mixed"),
)
BY_NAME = {case.name: case for case in CASES}
