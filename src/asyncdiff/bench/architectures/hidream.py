"""HiDream, whose tokens go to experts that their values choose: to see its forward, it would have to be
computed.

What is counted does not depend on the choice: every token goes to as many experts, and all are alike. So here
the tokens are dealt out in turn, which is also what training balances the experts for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from asyncdiff.bench.architectures.architecture import Architecture, image, randn

_TOKENS, _NUM_LAYERS, _NUM_SINGLE_LAYERS, _NUM_LLAMA_LAYERS = 128, 16, 32, 32
_LAYERS = range(_NUM_LAYERS + _NUM_SINGLE_LAYERS)
_CONFIG: dict[str, Any] = {
    "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": _NUM_LAYERS,
    "num_single_layers": _NUM_SINGLE_LAYERS, "attention_head_dim": 128, "num_attention_heads": 20,
    "caption_channels": [4096, 4096], "text_emb_dim": 2048, "num_routed_experts": 4,
    "num_activated_experts": 2, "axes_dims_rope": (64, 32, 32), "max_resolution": (128, 128),
    "llama_layers": [min(layer, _NUM_LLAMA_LAYERS - 1) for layer in _LAYERS],
}  # fmt: skip


class DealtOut:
    """In the place of `moe_infer`: expert i of n takes the i-th of n equal parts of the tokens' visits."""

    def __init__(self, experts: nn.Module) -> None:
        self._experts = experts

    def __call__(self, x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        visits = x.repeat_interleave(len(weights) // len(x), dim=0)
        experts: Any = self._experts.experts
        parts = visits.tensor_split(len(experts))
        visited = torch.cat([expert(part) for expert, part in zip(experts, parts, strict=True)]) * weights
        return visited.view(len(x), -1, x.shape[-1]).sum(dim=1)


def deal_out_tokens(denoiser: nn.Module) -> None:
    """Let no expert be chosen by values."""
    for module in denoiser.modules():
        if hasattr(module, "moe_infer"):
            vars(module)["moe_infer"] = DealtOut(module)


def _conditions(latents: torch.Tensor) -> dict[str, Any]:
    llama = randn(latents, _NUM_LLAMA_LAYERS, _TOKENS, 4096).transpose(0, 1)
    return {
        "encoder_hidden_states_t5": randn(latents, _TOKENS, 4096),
        "encoder_hidden_states_llama3": llama.contiguous(),
        "pooled_embeds": randn(latents, 2048),
    }


ARCHITECTURES = (
    Architecture(
        "hidream", "HiDream I1", "HiDreamImageTransformer2DModel", image(16), _conditions, _CONFIG,
        batch=2, timestep_name="timesteps", prepare=deal_out_tokens,
    ),
)  # fmt: skip
