"""What a tiny stand-in is, and how any of them is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class TinyCall:
    """What may differ between two generations. `large`: another resolution (or number of frames)."""

    steps: int = 4
    seed: int = 0
    batch: int = 1
    large: bool = False

    def generator(self) -> torch.Generator:
        """The noise of this call."""
        return torch.Generator().manual_seed(self.seed)

    def randn(self, *shape: int) -> torch.Tensor:
        """Embeddings as if from a text encoder; of the seed, but not the generator's numbers."""
        return torch.randn(shape, generator=torch.Generator().manual_seed(1000 + self.seed))


@dataclass(frozen=True)
class TinyPipeline:
    """A family of pipelines.

    `build`: the pipeline, on the CPU in float32, the same weights every time. `arguments`: what `pipe(...)`
    is given for a call, guidance on where the family has it. `denoisers`: the attributes of `pipe` that are
    divided. `calls_per_step`: of a denoiser, with those arguments.
    """

    name: str
    build: Callable[[], Any]
    arguments: Callable[[TinyCall], dict[str, Any]]
    denoisers: tuple[str, ...] = ("transformer",)
    calls_per_step: int = 1


def generate(stand_in: TinyPipeline, pipe: Any, call: TinyCall | None = None, **changes: Any) -> torch.Tensor:
    """The tensor that `pipe` returns (latents, where the family can return them). `changes`: to the
    arguments."""
    output = pipe(**(stand_in.arguments(call or TinyCall()) | changes), return_dict=False)
    if not isinstance(output, torch.Tensor):  # Stable Video Diffusion returns the tensor itself
        output = output[0]
    while isinstance(output, list | tuple):
        output = output[0] if len(output) == 1 else torch.stack([torch.as_tensor(each) for each in output])
    return torch.as_tensor(output)
