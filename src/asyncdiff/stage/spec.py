"""What a stage worker needs to know to run its part of the denoiser: small, frozen, picklable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from asyncdiff.graph import Atom, TensorSpec
from asyncdiff.trace.inputs import InputsSpec
from asyncdiff.trace.torch_private import Structure, tree_unflatten


@dataclass(frozen=True)
class Received:
    """A leaf that another stage produced: read for own segment `segment`; `clone` if it is written in place
    later, which would corrupt the buffer for the next read of the same version. `later`: where it is replayed
    as memory of this spec, which an own block fills when it has run (`Own.fills`)."""

    atom: Atom
    segment: int
    clone: bool
    later: TensorSpec | None = None


@dataclass(frozen=True)
class Argument:
    """The leaf that the call passes through: argument leaf `index` (positional first, then keyword)."""

    index: int


@dataclass(frozen=True)
class Constant:
    """A leaf that is no tensor, as recorded."""

    value: Any


@dataclass(frozen=True)
class Placeholder:
    """A tensor that nothing on this stage depends on, but which glue may handle."""

    spec: TensorSpec


Fill = Received | Argument | Constant | Placeholder


@dataclass(frozen=True)
class Capture:
    """Hand over output leaf `leaf` as `atom`; `clone` if glue writes into it before it may have been sent."""

    leaf: int
    atom: Atom
    clone: bool


@dataclass(frozen=True)
class Run:
    """Run the module's own forward: a container, or glue."""


@dataclass(frozen=True)
class Own:
    """Run one of this stage's blocks; `is_last`: end the forward after it. `fills`: foreign leaves that are
    wanted from now on, and have been replayed without being there."""

    captures: tuple[Capture, ...]
    is_last: bool
    fills: tuple[Received, ...] = ()


@dataclass(frozen=True)
class Stub:
    """Run nothing: return `structure` filled with `leaves`."""

    structure: Structure
    leaves: tuple[Fill, ...]


Action = Run | Own | Stub


@dataclass(frozen=True)
class OutputSpec:
    """The structure of what the denoiser returns; its tensor leaves are `tensors`, in order."""

    structure: Structure
    leaves: tuple[TensorSpec | Constant, ...]

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        return tuple(leaf for leaf in self.leaves if isinstance(leaf, TensorSpec))

    def rebuild(self, tensors: Sequence[torch.Tensor]) -> Any:
        """What forward returned (an output class, a tuple), around these tensor leaves."""
        remaining = iter(tensors)
        values = [next(remaining) if isinstance(leaf, TensorSpec) else leaf.value for leaf in self.leaves]
        return tree_unflatten(values, self.structure)


@dataclass(frozen=True)
class StageSpec:
    """One stage of one partition, for one structure of inputs.

    `actions`: module path -> what its calls do, indexed by call number in this stage's own forward.
    `needed_inputs`: names of the tensor inputs whose data the stage uses, through glue too. `written_inputs`:
    inputs that the forward writes into, of which a run makes copies.
    `reads`: own segment -> foreign leaves it reads; `emits`: own leaves that others read; both in the order
    of production. `tensors`: dotted names of the parameters and buffers to hold: below own blocks, used by
    glue, and below no block. `used_tensors`: those of them that this structure's forward touches; what
    another structure, with the same ownership, must find there. `output`: what the denoiser returns (on every
    stage); `returns_output`: whether this stage computes it.
    """

    stage: int
    inputs: InputsSpec
    actions: tuple[tuple[str, tuple[Action, ...]], ...]
    needed_inputs: tuple[str, ...]
    written_inputs: frozenset[str]
    reads: dict[int, tuple[Atom, ...]]
    emits: tuple[Atom, ...]
    tensors: frozenset[str]
    used_tensors: frozenset[str]
    output: OutputSpec
    returns_output: bool
