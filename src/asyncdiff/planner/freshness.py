"""Which leaves arrive in time to be read in the round that produces them (docs/method.md, section 6).

All stages of an asynchronous round work at the same time. Stage 0 has the first skip connection of a U-Net
ready when it has hardly begun, and the last stage wants it when it is nearly done: nobody waits for it. Where
that is so is decided here, from the blocks' times, and not by what happens to arrive first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from asyncdiff.graph import Atom, BlockGraph, BlockKey, Partition, Segment, crossing_atoms
from asyncdiff.planner.costs import glue_seconds
from asyncdiff.planner.cuts import first_stage_seconds
from asyncdiff.planner.partitioning import stage_speeds

MARGIN = 0.03
"""How much earlier than at its first use a leaf must have arrived, in rounds: block times are not exact."""

# Latency and bytes per second of a link between two devices of a kind, on the slow side.
_LINKS = {"cpu": (5e-4, 2e9), "cuda": (5e-5, 8e9)}


@dataclass(frozen=True)
class FreshRead:
    """A leaf that segment `reader` reads in the round that produces it. `lead_s`: how much later, on devices
    of speed 1, the reader must start than the producer so as not to wait; negative where it may start first.
    """

    atom: Atom
    producer: int
    reader: int
    lead_s: float


def fresh_reads(
    graph: BlockGraph,
    partition: Partition,
    seconds: Sequence[float],
    *,
    stride: int = 1,
    speeds: Sequence[float] | None = None,
    driver_seconds: float = 0.0,
    device_kind: str = "cpu",
) -> tuple[FreshRead, ...]:
    """Every leaf and reader for which (end of its producer) + (transfer) <= (first use), within a round of
    the steady state.

    `seconds` per block, `speeds` per rank and `driver_seconds` as in `partition_chain`. E of a nested split
    is left out: the inner stages read all of it fresh, because they start after it. A round is as long as
    its slowest stage takes; a stage that takes less starts later, and so wants its reads later.
    """
    segments = partition.segments(graph)
    if len(segments) == 1:
        return ()
    times = _Times(graph, partition, segments, seconds, stride, speeds, driver_seconds)
    latency_s, bytes_per_s = _LINKS["cpu" if device_kind == "cpu" else "cuda"]
    found: list[FreshRead] = []
    for (producer, reader), atoms in crossing_atoms(graph, segments).items():
        if partition.kind == "nested" and producer == 0:
            continue
        link_free_s = 0.0
        for atom in atoms:
            sent_s = max(times.end[atom.block], link_free_s)
            link_free_s = sent_s + latency_s + graph.spec(atom).num_bytes / bytes_per_s
            use_s = times.first_use(atom, segments[reader])
            if link_free_s + MARGIN * times.round_s <= use_s:
                lead_s = times.into_segment(times.end[atom.block], producer) - times.into_segment(
                    use_s, reader
                )
                found.append(FreshRead(atom, producer, reader, lead_s))
    return tuple(found)


def leads(reads: Iterable[FreshRead]) -> tuple[tuple[int, int, float], ...]:
    """(producing segment, reading segment, the largest `lead_s` between them)."""
    largest: dict[tuple[int, int], float] = {}
    for read in reads:
        pair = (read.producer, read.reader)
        largest[pair] = max(read.lead_s, largest.get(pair, read.lead_s))
    return tuple((*pair, lead_s) for pair, lead_s in sorted(largest.items()))


class _Times:
    """When every block runs, in seconds since the driver has dispatched the round.

    The driver's stage begins then. All other segments are taken to run as late as they may without making
    the round longer: that is when their blocks' outputs are there at the latest, and until when their reads
    can wait.
    """

    def __init__(
        self,
        graph: BlockGraph,
        partition: Partition,
        segments: Sequence[Segment],
        seconds: Sequence[float],
        stride: int,
        speeds: Sequence[float] | None,
        driver_seconds: float,
    ) -> None:
        self.graph = graph
        self.start: dict[BlockKey, float] = {}
        self.end: dict[BlockKey, float] = {}
        stage_speed = stage_speeds(partition.kind, partition.num_stages, stride, speeds)
        self._speed = [stage_speed[segment.stage] for segment in segments]
        self._cost = {block.key: each for block, each in zip(graph.blocks, seconds, strict=True)}
        self._glue = glue_seconds(graph, tuple(seconds))
        self._segment_end: list[float] = []
        self._segment_start: list[float] = []
        driver_speed = 1.0 if speeds is None else speeds[0]
        self.round_s = self._round_seconds(partition, stage_speed, driver_speed, stride * driver_seconds)
        predicted_s = self.round_s - stride * driver_seconds / driver_speed
        self._place_forwards(segments[0], 0.0)
        for segment in segments[1:]:
            is_inner = partition.kind == "nested" and segment.stage != 0
            last_s = self.round_s + self._segment_end[0] if is_inner else predicted_s
            self._place_backwards(segment, last_s, has_glue=segment.stage != 0)

    def first_use(self, atom: Atom, reader: Segment) -> float:
        """When a segment wants a leaf that it reads: when the last of its blocks has ended before anything
        touches the data, or when it begins if there is none. Numbers that glue may compute with must be
        right at once."""
        wanted = self._blocks_before_use(atom, reader)
        before = [key for key in reader.blocks if self.graph.index[key] < wanted]
        if not before or not self.graph.spec(atom).is_floating:
            return self._segment_start[reader.index]
        return self.end[before[-1]]

    def _blocks_before_use(self, atom: Atom, reader: Segment) -> int:
        """How many blocks of the denoiser have ended by then."""
        graph = self.graph
        uses = [
            _earliest(graph.index[key], graph.blocks[graph.index[key]].reads, glue_uses, atom)
            for key in reader.blocks
            for glue_uses in [graph.blocks[graph.index[key]].glue_uses]
            if atom in graph.blocks[graph.index[key]].reads
        ]
        if reader.index == len(self._speed) - 1 and atom in graph.output_reads:
            uses.append(_earliest(len(graph.blocks), graph.output_reads, graph.output_glue_uses, atom))
        return min(uses)

    def into_segment(self, time_s: float, segment: int) -> float:
        """Seconds since a segment's start, as on a device of speed 1."""
        return (time_s - self._segment_start[segment]) * self._speed[segment]

    def _round_seconds(
        self, partition: Partition, stage_speed: Sequence[float], driver_speed: float, driver_seconds: float
    ) -> float:
        work = [sum(self._cost[key] for key in keys) + self._glue for keys in partition.stages]
        others = (own / speed for own, speed in zip(work[1:], stage_speed[1:], strict=True))
        return max(first_stage_seconds(work[0], stage_speed[0], driver_speed, driver_seconds), *others)

    def _place_forwards(self, segment: Segment, start_s: float) -> None:
        speed = self._speed[segment.index]
        self._segment_start.append(start_s)
        now_s = start_s + self._glue / speed
        for key in segment.blocks:
            self.start[key] = now_s
            now_s = self.end[key] = now_s + self._cost[key] / speed
        self._segment_end.append(now_s)

    def _place_backwards(self, segment: Segment, end_s: float, *, has_glue: bool) -> None:
        speed = self._speed[segment.index]
        self._segment_end.append(end_s)
        now_s = end_s
        for key in reversed(segment.blocks):
            self.end[key] = now_s
            now_s = self.start[key] = now_s - self._cost[key] / speed
        self._segment_start.append(now_s - (self._glue / speed if has_glue else 0.0))


def _earliest(own: int, reads: Sequence[Atom], glue_uses: Sequence[int | None], atom: Atom) -> int:
    """Before the reader at position `own`, unless glue touches the leaf's data on the way to it."""
    touched = glue_uses[reads.index(atom)] if glue_uses else None
    return own if touched is None else min(own, touched)
