"""Which stage runs which block, and what then crosses from segment to segment."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from functools import cached_property

from asyncdiff.errors import ConfigurationError
from asyncdiff.graph.blocks import Atom, BlockGraph, BlockKey


@dataclass(frozen=True)
class Segment:
    """A maximal run, in execution order, of blocks on one stage.

    A chain has one segment per stage; a nested split has two on stage 0 (E before and Z after the inner
    stages). Without blocks where the stage is idle.
    """

    index: int
    stage: int
    blocks: tuple[BlockKey, ...]


@dataclass(frozen=True)
class Partition:
    """Block -> stage. `stages[k]` lists the blocks of stage k in execution order.

    `kind` is `"chain"` (contiguous in execution order) or `"nested"` (stage 0 holds the first and the last
    blocks, the others a chain between them; docs/method.md section 6). `may_idle`: stages may be without
    blocks: calls of another structure than the one that the stages were made for may skip all of a stage's
    (skip-layer guidance).
    """

    kind: str
    stages: tuple[tuple[BlockKey, ...], ...]
    may_idle: bool = field(default=False, compare=False)

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    @property
    def replicated_stage(self) -> int:
        """The stage that runs once per step of a round, on `stride` devices: the one that predicts."""
        return 0 if self.kind == "nested" else self.num_stages - 1

    @cached_property
    def stage_of(self) -> dict[BlockKey, int]:
        return {key: stage for stage, keys in enumerate(self.stages) for key in keys}

    def segments(self, graph: BlockGraph) -> tuple[Segment, ...]:
        """The segments in execution order; `ConfigurationError` if a block is missing, unknown or repeated or
        if the stages are not in the order that `kind` says."""
        self.validate(graph)
        order = self._expected_order()
        blocks: list[list[BlockKey]] = [[] for _ in order]
        index = 0
        for block in graph.blocks:
            while order[index] != self.stage_of[block.key]:
                index += 1
            blocks[index].append(block.key)
        return tuple(Segment(i, order[i], tuple(keys)) for i, keys in enumerate(blocks))

    def validate(self, graph: BlockGraph) -> None:
        """Every block on exactly one stage, in the order that `kind` says."""
        listed = [key for keys in self.stages for key in keys]
        repeated = sorted({str(key) for key in listed if listed.count(key) > 1})
        missing = [str(block.key) for block in graph.blocks if block.key not in self.stage_of]
        unknown = [str(key) for key in listed if key not in graph.index]
        empty = [stage for stage, keys in enumerate(self.stages) if not keys]
        for what, names in (("repeats", repeated), ("misses", missing), ("names unknown", unknown)):
            if names:
                raise ConfigurationError(
                    f"The partition {what} block{'s' * (len(names) > 1)} {', '.join(names[:5])}"
                    f"{' ...' * (len(names) > 5)}. Every block must be on exactly one stage."
                )
        if empty and not self.may_idle:
            raise ConfigurationError(f"Stage {empty[0]} of the partition has no block. Use fewer stages.")
        order = self._stage_runs(graph)
        if order != self._expected_order() and not (self.may_idle and self._is_in_order(order)):
            raise ConfigurationError(
                f"A {self.kind} partition of {self.num_stages} stages must visit them in the order "
                f"{self._expected_order()} of execution, but this one visits {order}."
            )

    def _expected_order(self) -> list[int]:
        chain = list(range(self.num_stages))
        return [*chain, 0] if self.kind == "nested" and self.num_stages > 1 else chain

    def _is_in_order(self, stages: list[int]) -> bool:
        """Whether these are the expected ones, some left out."""
        expected = iter(self._expected_order())
        return all(stage in expected for stage in stages)

    def _stage_runs(self, graph: BlockGraph) -> list[int]:
        return [stage for stage, _ in itertools.groupby(self.stage_of[block.key] for block in graph.blocks)]


def crossing_atoms(
    graph: BlockGraph, segments: tuple[Segment, ...]
) -> dict[tuple[int, int], tuple[Atom, ...]]:
    """(producing segment, reading segment) -> the leaves that must be handed over, in order of production.

    Only pairs on different stages; what the denoiser's output uses is read by the last segment.
    """
    home = {key: segment for segment in segments for key in segment.blocks}
    found: dict[tuple[int, int], set[Atom]] = {}
    for block in graph.blocks:
        for atom in block.reads:
            _note_crossing(found, home[atom.block], home[block.key], atom)
    for atom in graph.output_reads:
        _note_crossing(found, home[atom.block], segments[-1], atom)
    return {pair: graph.order(atoms) for pair, atoms in sorted(found.items())}


def crossing_bytes(graph: BlockGraph, segments: tuple[Segment, ...]) -> dict[tuple[int, int], int]:
    """(producing segment, reading segment) -> bytes of the leaves that must be handed over, to one reader."""
    return {
        pair: sum(graph.spec(atom).num_bytes for atom in atoms)
        for pair, atoms in crossing_atoms(graph, segments).items()
    }


def _note_crossing(
    found: dict[tuple[int, int], set[Atom]], producer: Segment, reader: Segment, atom: Atom
) -> None:
    if producer.stage != reader.stage:
        found.setdefault((producer.index, reader.index), set()).add(atom)
