"""What crosses between workers for one input structure, in the order in which it is sent."""

from __future__ import annotations

from dataclasses import dataclass

from asyncdiff.graph.blocks import Atom, BlockGraph, BlockKey, TensorSpec
from asyncdiff.graph.partition import Segment, crossing_atoms


@dataclass(frozen=True)
class Wiring:
    """What crosses from each segment to each stage.

    `segment_of`: block -> segment. `crossing[segment, stage]`: the leaves of that segment that the stage
    reads, each once, in the order they are produced. `outputs`: the tensor leaves of a prediction.
    """

    segment_of: dict[BlockKey, int]
    crossing: dict[tuple[int, int], tuple[tuple[Atom, TensorSpec], ...]]
    outputs: tuple[TensorSpec, ...]

    def num_bytes(self, segment: int, stage: int) -> int:
        """Bytes that must cross from a segment to one worker of a stage, each time."""
        return sum(spec.num_bytes for _, spec in self.crossing.get((segment, stage), ()))

    @property
    def prediction_bytes(self) -> int:
        return sum(spec.num_bytes for spec in self.outputs)


def wire(graph: BlockGraph, segments: tuple[Segment, ...]) -> Wiring:
    """The wiring of a graph that is cut into these segments."""
    wanted: dict[tuple[int, int], set[Atom]] = {}
    for (producer, reader), atoms in crossing_atoms(graph, segments).items():
        wanted.setdefault((producer, segments[reader].stage), set()).update(atoms)
    return Wiring(
        segment_of={key: segment.index for segment in segments for key in segment.blocks},
        crossing={
            pair: tuple((atom, graph.spec(atom)) for atom in graph.order(atoms))
            for pair, atoms in wanted.items()
        },
        outputs=graph.outputs,
    )
