"""A tiny real pipeline, and a module that misbehaves on demand. Importable in the workers, as `__main__` is not."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn

NUM_STEPS = 5


def tiny_unet() -> UNet2DConditionModel:
    """Random weights from a fixed seed."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 16), layers_per_block=1, cross_attention_dim=16, norm_num_groups=4,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip


def tiny_pipeline(
    unet: nn.Module | None = None, dtype: torch.dtype = torch.float32
) -> StableDiffusionPipeline:
    """A StableDiffusionPipeline without text encoder."""
    torch.manual_seed(1)
    vae = AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=None, tokenizer=None, unet=tiny_unet() if unet is None else unet,
        scheduler=DDIMScheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.to(dtype)
    return pipe


def generate(pipe: Any, *, seed: int = 3, num_steps: int = NUM_STEPS, **kwargs: Any) -> torch.Tensor:
    """Latents of one picture, with guidance, decided by `seed`."""
    random = torch.Generator().manual_seed(seed)
    prompt = torch.randn(1, 24, 16, generator=random).to(pipe.unet.dtype)
    negative = torch.randn(1, 24, 16, generator=random).to(pipe.unet.dtype)
    return pipe(
        prompt_embeds=prompt, negative_prompt_embeds=negative, num_inference_steps=num_steps, height=8, width=8,
        generator=random, output_type="latent", **kwargs,
    ).images  # fmt: skip


class Saboteur(nn.Module):
    """Wraps a block; does what the file says, once, in the process whose pid it names (0: in any)."""

    def __init__(self, inner: nn.Module, orders: Path) -> None:
        super().__init__()
        self.inner = inner
        self.orders = str(orders)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if os.path.exists(self.orders):
            self._obey()
        return self.inner(*args, **kwargs)

    def _obey(self) -> None:
        pid, action = Path(self.orders).read_text().split(maxsplit=1)
        if int(pid) in (0, os.getpid()):
            os.unlink(self.orders)
            ACTIONS[action]()


def _fail() -> None:
    raise RuntimeError("sabotage")


def _interrupt_parent() -> None:
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(0.3)


ACTIONS: dict[str, Callable[[], None]] = {
    "fail": _fail,
    "die": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "interrupt driver": _interrupt_parent,
    "interrupt": lambda: os.kill(os.getpid(), signal.SIGINT),
    "kill driver": lambda: os.kill(os.getppid(), signal.SIGKILL),
    "sleep": lambda: time.sleep(60),
}


def sabotage(pipe: Any, name: str, orders: Path) -> None:
    """Put a saboteur around the denoiser's module `name`."""
    owner_name, _, attribute = name.rpartition(".")
    owner = pipe.unet.get_submodule(owner_name)
    setattr(owner, attribute, Saboteur(getattr(owner, attribute), orders))


def order(orders: Path, action: str, pid: int = 0) -> None:
    """Tell the saboteurs what to do next; in one piece, as they may look at any moment."""
    draft = orders.with_suffix(".draft")
    draft.write_text(f"{pid} {action}")
    draft.rename(orders)


def ordering_at(step: int, orders: Path, action: str, pid: int = 0) -> Callable[..., dict[str, Any]]:
    """A `callback_on_step_end` that gives the order after a step."""

    def callback(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if index == step:
            order(orders, action, pid)
        return kwargs

    return callback
