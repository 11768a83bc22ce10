"""How many bytes enter a run of blocks from outside, for every run there is."""

from __future__ import annotations

from collections.abc import Iterable

from asyncdiff.graph import Atom, BlockGraph


class EnteringBytes:
    """Bytes of the leaves that a segment reads of blocks on other stages.

    What the denoiser's output uses counts as read by the last block. The tables take a pass over all reads
    per block (about 10^5 set operations for 300 blocks).
    """

    def __init__(self, graph: BlockGraph) -> None:
        self._reads = _reads_by_block(graph)
        self._bytes = {atom: graph.spec(atom).num_bytes for atom, _ in _all(self._reads)}
        starts = range(len(graph.blocks))
        self._from_before = [self._row_from_before(start) for start in starts]
        self._to_end = [self._row_to_end(start) for start in starts]

    def before(self, start: int, end: int) -> int:
        """Into blocks [start, end), of what blocks before `start` produced."""
        return self._from_before[start][end - start]

    def around(self, start: int, end: int) -> int:
        """Into the blocks from `end` on, of what blocks [start, end) produced: into Z of a nested split."""
        return self._to_end[end][start]

    def _row_from_before(self, start: int) -> list[int]:
        seen: set[Atom] = set()
        row = [0]
        for reads in self._reads[start:]:
            new = {atom for atom, producer in reads if producer < start} - seen
            seen |= new
            row.append(row[-1] + sum(self._bytes[atom] for atom in new))
        return row

    def _row_to_end(self, end: int) -> list[int]:
        """Entry i: bytes of what blocks [i, end) produced and the blocks from `end` on read."""
        by_producer = [0] * (end + 1)
        for atom, producer in set(_all(self._reads[end:])):
            if producer < end:
                by_producer[producer] += self._bytes[atom]
        for producer in reversed(range(end)):
            by_producer[producer] += by_producer[producer + 1]
        return by_producer


def _reads_by_block(graph: BlockGraph) -> list[list[tuple[Atom, int]]]:
    """For each block, what it reads, with the position of the producing block."""
    found = [[(atom, graph.index[atom.block]) for atom in block.reads] for block in graph.blocks]
    found[-1] += [(atom, graph.index[atom.block]) for atom in graph.output_reads]
    return found


def _all(reads: Iterable[list[tuple[Atom, int]]]) -> Iterable[tuple[Atom, int]]:
    return (entry for entries in reads for entry in entries)
