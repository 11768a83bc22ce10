"""What stand-ins are put together from: weights in which no layer is idle, and a small autoencoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL
from torch import nn

_Module = TypeVar("_Module", bound=nn.Module)


def random_weights(build: Callable[[], _Module], seed: int = 0) -> _Module:
    """What `build` makes, in eval mode, the same weights every time, none of them constant.

    Many denoisers start with their gates and output layers at zero, which would hide a wrong input.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = build().eval()
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.numel() > 1 and parameter.float().std() == 0:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


def autoencoder(channels: int = 4, *, levels: int = 1, **changes: Any) -> AutoencoderKL:
    """An autoencoder that shrinks pictures by 2 to the `levels` - 1: by default one latent per pixel."""
    config: dict[str, Any] = {
        "block_out_channels": (4,) * levels, "norm_num_groups": 2, "latent_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels, "shift_factor": 0.1,
    }  # fmt: skip
    return random_weights(lambda: AutoencoderKL(**(config | changes)), seed=1)


def quiet(pipe: Any) -> Any:
    """The pipeline without its progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe
