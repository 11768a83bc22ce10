"""What crosses between workers for one input structure, in the order in which it is sent."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from asyncdiff.graph.blocks import Atom, BlockGraph, BlockKey, TensorSpec
from asyncdiff.graph.partition import Segment, crossing_atoms


@dataclass(frozen=True)
class Wiring:
    """What crosses from each segment to each stage.

    `segment_of`: block -> segment. `crossing[segment, stage]`: the leaves of that segment that the stage
    reads, each once, in the order they are produced. `outputs`: the tensor leaves of a prediction.
    `crossings`: the (producing segment, reading segment) pairs between which any leaf crosses that is read
    in a later round than it is produced; `fresh_crossings`: those with a leaf that is read in the same
    round, which for each reading segment are the leaves in `fresh`.
    """

    segment_of: dict[BlockKey, int]
    crossing: dict[tuple[int, int], tuple[tuple[Atom, TensorSpec], ...]]
    outputs: tuple[TensorSpec, ...]
    crossings: tuple[tuple[int, int], ...]
    fresh_crossings: tuple[tuple[int, int], ...]
    fresh: dict[int, frozenset[Atom]]

    def num_bytes(self, segment: int, stage: int) -> int:
        """Bytes that must cross from a segment to one worker of a stage, each time."""
        return sum(spec.num_bytes for _, spec in self.crossing.get((segment, stage), ()))

    @property
    def prediction_bytes(self) -> int:
        return sum(spec.num_bytes for spec in self.outputs)


def wire(
    graph: BlockGraph, segments: tuple[Segment, ...], fresh: Collection[tuple[Atom, int]] = ()
) -> Wiring:
    """The wiring of a graph that is cut into these segments. `fresh`: (leaf, reading segment) of what is read
    in the round that produces it; those that do not cross here are left out."""
    wanted: dict[tuple[int, int], set[Atom]] = {}
    late: list[tuple[int, int]] = []
    in_time: list[tuple[int, int]] = []
    fresh_of: dict[int, frozenset[Atom]] = {}
    for (producer, reader), atoms in crossing_atoms(graph, segments).items():
        wanted.setdefault((producer, segments[reader].stage), set()).update(atoms)
        read_fresh = frozenset(atom for atom in atoms if (atom, reader) in fresh)
        fresh_of[reader] = fresh_of.get(reader, frozenset()) | read_fresh
        if read_fresh:
            in_time.append((producer, reader))
        if len(read_fresh) < len(atoms):
            late.append((producer, reader))
    return Wiring(
        segment_of={key: segment.index for segment in segments for key in segment.blocks},
        crossing={
            pair: tuple((atom, graph.spec(atom)) for atom in graph.order(atoms))
            for pair, atoms in wanted.items()
        },
        outputs=graph.outputs,
        crossings=tuple(late),
        fresh_crossings=tuple(in_time),
        fresh=fresh_of,
    )
