"""Blocks, the leaves they produce, and the graph they form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

_DTYPE_BYTES = {
    "float64": 8, "int64": 8, "complex64": 8, "complex128": 16, "float32": 4, "int32": 4, "uint32": 4,
    "float16": 2, "bfloat16": 2, "int16": 2, "uint16": 2, "bool": 1, "int8": 1, "uint8": 1,
    "float8_e4m3fn": 1, "float8_e5m2": 1,
}  # fmt: skip
_FLOATING = ("float", "bfloat", "complex")


class BlockKey(NamedTuple):
    """A call of a module: its dotted path in the denoiser, and which call of it (0-based) in a forward."""

    path: str
    call: int = 0

    def __str__(self) -> str:
        return self.path if self.call == 0 else f"{self.path}#{self.call}"


class Atom(NamedTuple):
    """One tensor leaf (`leaf`, 0-based over the flattened output) of what the block `path`#`call` returned.

    Stable across re-analysis of the same denoiser with other shapes.
    """

    path: str
    call: int
    leaf: int

    @property
    def block(self) -> BlockKey:
        return BlockKey(self.path, self.call)

    def __str__(self) -> str:
        return f"{self.block}[{self.leaf}]"


@dataclass(frozen=True)
class TensorSpec:
    """Shape, stride (in elements) and dtype name (`"float32"`, as torch spells it) of a tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * _DTYPE_BYTES[self.dtype]

    @property
    def is_floating(self) -> bool:
        return self.dtype.startswith(_FLOATING)


@dataclass(frozen=True)
class Block:
    """The smallest piece that is placed on a device.

    `flops`: multiply-adds counted twice. `memory_bytes`: bytes its operations read and write, for a roofline
    estimate. `seconds`: measured duration, None until profiled. `parameter_bytes`: of the weights below its
    module. `reads`: leaves of earlier blocks that an operation inside it uses, directly or through glue (the
    denoiser's code between blocks). `inputs`: names of the denoiser input leaves it uses likewise.
    `glue_uses`: for each of `reads`, in the same order, how many blocks of the denoiser have ended when glue
    first touches its data on the way to this block; None where only the block itself does.
    """

    key: BlockKey
    flops: float
    memory_bytes: float
    parameter_bytes: int
    outputs: tuple[TensorSpec | None, ...]
    reads: tuple[Atom, ...]
    inputs: tuple[str, ...]
    glue_uses: tuple[int | None, ...] = ()
    seconds: float | None = None


@dataclass(frozen=True)
class BlockGraph:
    """Blocks in execution order, and what the denoiser's output is made of.

    `output_reads` and `output_inputs`: the block leaves and denoiser input leaves that the returned tensors
    use (through glue after the last block), `output_glue_uses` as a block's. `outputs`: the returned tensor
    leaves. `glue_flops`, `glue_parameter_bytes`: work and weights outside all blocks, replicated on every
    stage. `glue_seconds`: measured duration of that work, None until profiled. `latents`: the input leaves
    that are other ones at every step; empty where that is not known.
    """

    blocks: tuple[Block, ...]
    output_reads: tuple[Atom, ...]
    output_inputs: tuple[str, ...]
    outputs: tuple[TensorSpec, ...]
    glue_flops: float = 0.0
    glue_parameter_bytes: int = 0
    glue_seconds: float | None = None
    latents: tuple[str, ...] = ()
    output_glue_uses: tuple[int | None, ...] = ()

    @cached_property
    def index(self) -> dict[BlockKey, int]:
        """Position of each block in execution order."""
        return {block.key: i for i, block in enumerate(self.blocks)}

    def spec(self, atom: Atom) -> TensorSpec:
        """The spec of a leaf; KeyError where the block does not exist or the leaf is not a tensor."""
        spec = self.blocks[self.index[atom.block]].outputs[atom.leaf]
        if spec is None:
            raise KeyError(f"{atom} is not a tensor")
        return spec

    def order(self, atoms: set[Atom]) -> tuple[Atom, ...]:
        """Atoms in the order in which they are produced: the order of every transfer."""
        return tuple(sorted(atoms, key=lambda atom: (self.index[atom.block], atom.leaf)))
