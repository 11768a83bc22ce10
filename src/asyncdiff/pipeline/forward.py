"""The place of a denoiser's forward: inside whatever diffusers' hooks are around it.

Hooks of torch (`register_forward_hook`) are outside of `forward` anyway. So all hooks on the denoiser itself
run once, in the driver, around the forward in its place; hooks on inner modules run where those are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from asyncdiff.weights.attachments import hook_registry, innermost_forward, replace_innermost_forward


def current_forward(denoiser: nn.Module) -> Callable[..., Any]:
    """What runs within the hooks."""
    registry = hook_registry(denoiser)
    forward: Callable[..., Any] = denoiser.forward if registry is None else innermost_forward(registry)
    return forward


def put_forward(denoiser: nn.Module, forward: Callable[..., Any]) -> None:
    """Run `forward` within the hooks."""
    registry = hook_registry(denoiser)
    if registry is not None:
        replace_innermost_forward(registry, forward)
    elif getattr(forward, "__func__", None) is type(denoiser).forward:
        vars(denoiser).pop("forward", None)  # the class's own needs no attribute
    else:
        vars(denoiser)["forward"] = forward
