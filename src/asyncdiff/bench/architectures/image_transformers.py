"""Modern transformers that make pictures, at 1024 x 1024."""

from __future__ import annotations

from typing import Any

import torch

from asyncdiff.bench.architectures.architecture import (
    Architecture,
    Part,
    all_ones,
    image,
    packed_image,
    randn,
    text,
    vector,
)

_PIXART: dict[str, Any] = {
    "caption_channels": 4096,
    "interpolation_scale": 2,
    "use_additional_conditions": False,
}
_HUNYUANDIT: dict[str, Any] = {
    "in_channels": 4,
    "patch_size": 2,
    "sample_size": 128,
    "hidden_size": 1408,
    "num_layers": 40,
    "mlp_ratio": 4.3637,
    "use_style_cond_and_image_meta_size": False,
}
_LUMINA2: dict[str, Any] = {"cap_feat_dim": 2304}
_COGVIEW4: dict[str, Any] = {"attention_head_dim": 128, "num_attention_heads": 32, "num_layers": 28}
# The published factors of the rotary embedding differ from 1 and cost the same.
_OMNIGEN: dict[str, Any] = {
    "rope_scaling": {"type": "su", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48}
}
_FLOW = "FlowMatchEulerDiscreteScheduler"


def _ids(length: int, num_axes: int, *, batched: bool = False) -> Part:
    shape = (1, length, num_axes) if batched else (length, num_axes)
    return lambda latents: torch.zeros(shape, dtype=latents.dtype)


def _image_ids(num_axes: int, *, batched: bool = False) -> Part:
    return lambda latents: _ids(latents.shape[1], num_axes, batched=batched)(latents)


def _chroma_mask(latents: torch.Tensor) -> torch.Tensor:
    return torch.ones(len(latents), 512 + latents.shape[1], dtype=latents.dtype)


def _hunyuandit(latents: torch.Tensor) -> dict[str, Any]:
    tokens = latents.shape[-2] * latents.shape[-1] // 4
    return {
        "encoder_hidden_states": randn(latents, 77, 1024),
        "text_embedding_mask": torch.ones(len(latents), 77, dtype=torch.int64),
        "encoder_hidden_states_t5": randn(latents, 256, 2048),
        "text_embedding_mask_t5": torch.ones(len(latents), 256, dtype=torch.int64),
        "image_rotary_emb": (torch.ones(tokens, 88), torch.zeros(tokens, 88)),
    }


def _qwen(latents: torch.Tensor) -> dict[str, Any]:
    side = round(latents.shape[1] ** 0.5)
    return {"encoder_hidden_states": randn(latents, 64, 3584), "img_shapes": [[(1, side, side)]]}


def _z_image(latents: torch.Tensor) -> dict[str, Any]:
    """Lists of one picture and one text each."""
    return {
        "x": [sample.unsqueeze(1) for sample in latents],
        "cap_feats": [torch.randn(64, 2560).to(latents.dtype) for _ in latents],
    }


def _cogview4(latents: torch.Tensor) -> dict[str, Any]:
    size = torch.full((len(latents), 2), 1024.0).to(latents.dtype)
    text_states = randn(latents, 224, 4096)
    return {
        "encoder_hidden_states": text_states,
        "original_size": size, "target_size": size.clone(), "crop_coords": torch.zeros_like(size),
    }  # fmt: skip


def _omnigen(latents: torch.Tensor) -> dict[str, Any]:
    """Text alone: no input pictures."""
    length = 32
    total = length + 1 + latents.shape[-2] * latents.shape[-1] // 4
    samples = len(latents)
    return {
        "input_ids": torch.ones(samples, length, dtype=torch.int64),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": torch.ones(samples, total, total, dtype=torch.int64),
        "position_ids": torch.arange(total).expand(samples, total).clone(),
    }


_FLUX = text(
    512, 4096,
    pooled_projections=vector(768), guidance=vector(), img_ids=_image_ids(3), txt_ids=_ids(512, 3),
)  # fmt: skip

ARCHITECTURES = (
    Architecture(
        "flux", "FLUX.1 dev", "FluxTransformer2DModel", packed_image(64), _FLUX, {"guidance_embeds": True},
        noise_scheduler=_FLOW, timestep_divisor=1000,
    ),
    Architecture(
        "flux2", "FLUX.2 dev", "Flux2Transformer2DModel", packed_image(128),
        text(
            512, 15360,
            guidance=vector(), img_ids=_image_ids(4, batched=True), txt_ids=_ids(512, 4, batched=True),
        ),
        noise_scheduler=_FLOW, timestep_divisor=1000,
    ),
    Architecture(
        "pixart-sigma", "PixArt-Sigma", "PixArtTransformer2DModel", image(4),
        text(
            300, 4096, encoder_attention_mask=all_ones(300),
            added_cond_kwargs=lambda _: {"resolution": None, "aspect_ratio": None},
        ),
        _PIXART, batch=2,
    ),
    Architecture(
        "sana", "Sana 1.6B", "SanaTransformer2DModel", image(32, 32),
        text(300, 2304, encoder_attention_mask=all_ones(300)), batch=2, noise_scheduler=_FLOW,
    ),
    Architecture(
        "hunyuan-dit", "HunyuanDiT 1.2", "HunyuanDiT2DModel", image(4), _hunyuandit, _HUNYUANDIT, batch=2,
    ),
    Architecture("qwen-image", "Qwen-Image", "QwenImageTransformer2DModel", packed_image(64), _qwen),
    Architecture(
        "z-image", "Z-Image", "ZImageTransformer2DModel", image(16), _z_image,
        latents_name="x", timestep_name="t",
    ),
    Architecture(
        "lumina2", "Lumina Image 2.0", "Lumina2Transformer2DModel", image(16),
        text(256, 2304, encoder_attention_mask=all_ones(256, torch.bool)), _LUMINA2,
    ),
    Architecture(
        "aura-flow", "AuraFlow", "AuraFlowTransformer2DModel", image(4), text(256, 2048), batch=2,
        noise_scheduler=_FLOW, timestep_divisor=1000,
    ),
    Architecture(
        "chroma", "Chroma", "ChromaTransformer2DModel", packed_image(64),
        text(512, 4096, img_ids=_image_ids(3), txt_ids=_ids(512, 3), attention_mask=_chroma_mask),
    ),
    Architecture(
        "cogview4", "CogView4", "CogView4Transformer2DModel", image(16), _cogview4, _COGVIEW4,
    ),
    Architecture(
        "omnigen", "OmniGen", "OmniGenTransformer2DModel", image(4), _omnigen, _OMNIGEN, batch=2,
    ),
)  # fmt: skip
