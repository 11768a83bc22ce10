"""Runs a split denoiser stage by stage, in order, every stage on a copy that holds only its own weights."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from asyncdiff.graph import Atom, BlockGraph, Partition, TensorSpec, crossing_atoms
from asyncdiff.stage import StageReplica, StageSpec, stage_spec
from asyncdiff.trace import Inputs, Recording, flatten_inputs
from asyncdiff.trace.tensors import zero_placeholder


def nan_placeholder(spec: TensorSpec, device: torch.device) -> torch.Tensor:
    """What nobody should read, made so that reading it shows."""
    tensor = zero_placeholder(spec, device)
    return tensor.fill_(float("nan")) if tensor.is_floating_point() and 0 not in tensor.stride() else tensor


def stage_copy(module: nn.Module, spec: StageSpec) -> nn.Module:
    """A copy with the stage's own tensors; all others are on meta."""
    memo: dict[int, Any] = {}
    for path, owner in module.named_modules(remove_duplicate=False):
        for name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is not None and f"{path}.{name}".lstrip(".") not in spec.tensors:
                meta = torch.empty_like(tensor, device="meta")
                memo[id(tensor)] = (
                    nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta
                )
    return copy.deepcopy(module, memo)


def cut(graph: BlockGraph, kind: str, num_stages: int) -> Partition:
    """Any partition will do for correctness: equal numbers of blocks."""
    keys = [block.key for block in graph.blocks]
    if kind == "chain":
        bounds = [len(keys) * k // num_stages for k in range(num_stages + 1)]
        return Partition("chain", tuple(tuple(keys[a:b]) for a, b in itertools.pairwise(bounds)))
    bounds = [len(keys) * k // (num_stages + 1) for k in range(num_stages + 2)]
    parts = [tuple(keys[a:b]) for a, b in itertools.pairwise(bounds)]
    return Partition("nested", (parts[0] + parts[-1], *parts[1:-1]))


def specs_of(
    recording: Recording, graph: BlockGraph, partition: Partition, *, fresh: bool = False
) -> list[StageSpec]:
    """The specs of all stages as another process would get them; `fresh`: everything may come late."""
    segments = partition.segments(graph)
    crossing = crossing_atoms(graph, segments)
    arriving = {
        segment.index: {
            atom for (_, reader), atoms in crossing.items() if reader == segment.index for atom in atoms
        }
        for segment in segments
    }
    return [
        pickle.loads(
            pickle.dumps(stage_spec(recording, graph, partition, stage, arriving if fresh else None))
        )
        for stage in range(partition.num_stages)
    ]


class Split:
    """All stages of one partition, with the values they have handed over."""

    def __init__(
        self,
        module: nn.Module,
        recording: Recording,
        graph: BlockGraph,
        partition: Partition,
        *,
        fresh: bool = False,
    ) -> None:
        self.specs: dict[Any, list[StageSpec]] = {}
        self.replicas: list[StageReplica] = []
        self.partition = partition
        specs = specs_of(recording, graph, partition, fresh=fresh)
        for spec in specs:
            self.replicas.append(
                StageReplica(stage_copy(module, spec), placeholder=nan_placeholder, buffer=nan_placeholder)
            )
        self.prepare("key", specs)

    def prepare(self, key: Any, specs: list[StageSpec]) -> None:
        self.specs[key] = specs
        for replica, spec in zip(self.replicas, specs, strict=True):
            replica.prepare(key, spec)

    def run(self, inputs: Inputs, key: Any = "key", poison: Atom | None = None) -> list[torch.Tensor]:
        """The stages in order; a nested split's stage 0 waits in mid-forward for the inner ones."""
        values: dict[Atom, torch.Tensor] = {}
        specs = self.specs[key]

        def run_stage(stage: int) -> list[torch.Tensor] | None:
            def read(segment: int, atom: Atom, out: torch.Tensor | None) -> torch.Tensor:
                assert atom in specs[stage].reads[segment]
                seen.append(atom)
                if atom not in values:
                    assert self.partition.kind == "nested"
                    assert stage == 0
                    for inner in range(1, self.partition.num_stages):
                        run_stage(inner)
                value = poisoned(values[atom]) if atom == poison else values[atom].clone()
                return value if out is None else out.copy_(value)

            def emit(atom: Atom, tensor: torch.Tensor) -> None:
                assert atom in specs[stage].emits
                assert atom not in values
                values[atom] = tensor

            seen: list[Atom] = []
            spec = specs[stage]
            given = {name: t.clone() for name, t in inputs.tensors().items() if name in spec.needed_inputs}
            out = self.replicas[stage].run(key, given, inputs.floats(), read, emit)
            assert sorted(seen) == sorted({a for atoms in spec.reads.values() for a in atoms})
            assert (out is not None) == spec.returns_output
            return out

        order = [0] if self.partition.kind == "nested" else list(range(self.partition.num_stages))
        out = [run_stage(stage) for stage in order][-1]
        assert out is not None
        return out


def poisoned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor + 1 if tensor.is_floating_point() else 1 - tensor


def whole(module: nn.Module, kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The unsplit denoiser's tensor leaves, computed on inputs of its own."""
    with torch.no_grad():
        inputs = inputs_of(module, kwargs)
        out = module(**inputs.rebuild({name: tensor.clone() for name, tensor in inputs.tensors().items()}))
    return [leaf for leaf in torch.utils._pytree.tree_leaves(out) if isinstance(leaf, torch.Tensor)]


def inputs_of(module: nn.Module, kwargs: Mapping[str, Any]) -> Inputs:
    return flatten_inputs(type(module).forward, (), kwargs)


def assert_bitwise(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert torch.isfinite(other).all()
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
