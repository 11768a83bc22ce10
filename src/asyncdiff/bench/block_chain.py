"""A made-up denoiser whose exchange and compute are chosen freely: what its blocks hand on is as large, and
they take as long, as a measurement wants it."""

from __future__ import annotations

import time

import torch
from torch import nn

from asyncdiff.bench.architectures import Architecture, DenoisingLoop
from asyncdiff.bench.threads import intra_op_threads

_WIDTH = 256
_LATENTS = (4, 8, 8)
_CALIBRATION_REPEATS = 64

NUM_BLOCKS = 4
PARTITIONS: dict[str, list[list[str]]] = {
    "chain": [["enter", "blocks.0", "blocks.1"], ["blocks.2", "blocks.3", "leave"]],
    "nested": [["enter", "blocks.0", "blocks.3", "leave"], ["blocks.1", "blocks.2"]],
}
"""Two stages of two blocks each: the hidden states cross once a step in a chain, there and back in a nested
split."""


class BlockChain(nn.Module):
    """`NUM_BLOCKS` blocks that hand on `state_bytes` of float32, each with `repeats` products of matrices."""

    def __init__(self, state_bytes: int, repeats: int) -> None:
        super().__init__()
        self.enter = _Enter(state_bytes // 4)
        self.blocks = nn.ModuleList(_Block(repeats) for _ in range(NUM_BLOCKS))
        self.leave = _Leave()

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, return_dict: bool = False
    ) -> tuple[torch.Tensor]:
        state = self.enter(sample, timestep)
        for block in self.blocks:
            state = block(state)
        return (self.leave(state, sample),)


class _Enter(nn.Module):
    def __init__(self, elements: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(elements))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.bias + sample.mean() + timestep.mean() / 1000


class _Block(nn.Module):
    def __init__(self, repeats: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(_WIDTH, _WIDTH) / _WIDTH**0.5)
        self.repeats = repeats

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        x = state[:_WIDTH] + self.weight
        for _ in range(self.repeats):
            x = torch.mm(x, self.weight)
        return state + x.mean()


class _Leave(nn.Module):
    def forward(self, state: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        return sample * state.mean().tanh()


def block_chain_loop(state_bytes: int, block_ms: float, device: str) -> DenoisingLoop:
    """The denoiser in a loop on `device`, its blocks taking about so long on one core of this machine."""
    architecture = Architecture(
        name="block-chain",
        title="a chain of blocks",
        class_name="",
        latent_shape=lambda height, width: _LATENTS,
        conditions=lambda latents: {},
        noise_scheduler="FlowMatchEulerDiscreteScheduler",
    )
    torch.manual_seed(0)
    repeats = max(1, round(block_ms / 1e3 / _seconds_per_repeat(device)))
    denoiser = BlockChain(state_bytes, repeats).eval()
    return DenoisingLoop(architecture, denoiser, 64, torch.float32).to(device)


def _seconds_per_repeat(device: str) -> float:
    block, state = _Block(_CALIBRATION_REPEATS).to(device), torch.zeros(_WIDTH, device=device)
    with intra_op_threads(1), torch.no_grad():
        seconds = [_timed(block, state) for _ in range(5)]
    return min(seconds) / _CALIBRATION_REPEATS


def _timed(block: _Block, state: torch.Tensor) -> float:
    start = time.perf_counter()
    float(block(state).sum())  # waits for a GPU too
    return time.perf_counter() - start
