"""Transformers that make videos."""

from __future__ import annotations

from typing import Any

import torch

from asyncdiff.bench.architectures.architecture import (
    Architecture,
    all_ones,
    randn,
    text,
    vector,
    video,
)

_COGVIDEOX: dict[str, Any] = {
    "num_attention_heads": 48,
    "num_layers": 42,
    "use_rotary_positional_embeddings": True,
}
_WAN22_5B: dict[str, Any] = {
    "in_channels": 48,
    "out_channels": 48,
    "num_attention_heads": 24,
    "num_layers": 30,
    "ffn_dim": 14336,
}
_LATTE: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "attention_head_dim": 72,
    "cross_attention_dim": 1152,
    "caption_channels": 4096,
    "attention_bias": True,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
}


def _cogvideox(latents: torch.Tensor) -> dict[str, Any]:
    frames, _, height, width = latents.shape[1:]
    tokens = frames * height * width // 4
    rotary = (torch.ones(tokens, 64), torch.zeros(tokens, 64))
    return {"encoder_hidden_states": randn(latents, 226, 4096), "image_rotary_emb": rotary}


def _wan_per_token(latents: torch.Tensor) -> dict[str, Any]:
    """Every token has a timestep of its own."""
    frames, height, width = latents.shape[2:]
    timestep = torch.full((len(latents), frames * height * width // 4), 500.0)
    return {"timestep": timestep} | text(512, 4096)(latents)


def _ltx_latents(height: int, width: int) -> tuple[int, ...]:
    """16 latent frames of 32 x 32 pixels a token."""
    return (16 * (height // 32) * (width // 32), 128)


def _ltx(latents: torch.Tensor) -> dict[str, Any]:
    where = {"num_frames": 16, "height": 16, "width": 24, "rope_interpolation_scale": (8 / 25, 32, 32)}
    return text(128, 4096, encoder_attention_mask=all_ones(128))(latents) | where


ARCHITECTURES = (
    Architecture(
        "wan-2.1", "Wan 2.1 14B, 81 frames", "WanTransformer3DModel", video(16, 21), text(512, 4096),
        height=480, width=832, noise_scheduler="FlowMatchEulerDiscreteScheduler",
    ),
    # Two of the same shape, one for the noisy steps, one for the others.
    Architecture(
        "wan-2.2", "Wan 2.2 A14B (each of two), 81 frames", "WanTransformer3DModel", video(16, 21),
        text(512, 4096), height=720, width=1280,
    ),
    Architecture(
        "wan-2.2-5b", "Wan 2.2 TI2V 5B, 121 frames", "WanTransformer3DModel", video(48, 31, 16),
        _wan_per_token, _WAN22_5B, height=704, width=1280,
    ),
    Architecture(
        "ltx", "LTX-Video 2B, 121 frames", "LTXVideoTransformer3DModel", _ltx_latents, _ltx,
        height=512, width=768, batch=2,
    ),
    Architecture(
        "hunyuan-video", "HunyuanVideo, 65 frames", "HunyuanVideoTransformer3DModel", video(16, 17),
        text(
            256, 4096,
            encoder_attention_mask=all_ones(256), pooled_projections=vector(768), guidance=vector(),
        ),
        height=544, width=960,
    ),
    Architecture(
        "cogvideox", "CogVideoX 5B, 49 frames", "CogVideoXTransformer3DModel",
        video(16, 13, frames_first=True), _cogvideox, _COGVIDEOX, height=480, width=720, batch=2,
    ),
    Architecture(
        "mochi", "Mochi 1, 37 frames", "MochiTransformer3DModel", video(12, 7),
        text(256, 4096, encoder_attention_mask=all_ones(256, torch.bool)), height=480, width=848, batch=2,
    ),
    Architecture(
        "latte", "Latte, 16 frames", "LatteTransformer3DModel", video(4, 16), text(120, 4096), _LATTE,
        height=512, width=512, batch=2,
    ),
)  # fmt: skip
