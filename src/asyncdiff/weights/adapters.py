"""What adapters (peft) have done to the weights."""

from __future__ import annotations

from torch import nn


def merged_adapters(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """By layer, the adapters that are fused into its weights: no spec or name tells that."""
    return {
        name: tuple(layer.merged_adapters)
        for name, layer in module.named_modules()
        if getattr(layer, "merged_adapters", None)
    }
