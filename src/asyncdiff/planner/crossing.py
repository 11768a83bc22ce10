"""How many bytes enter a run of blocks from outside, for every run there is."""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate

from asyncdiff.graph import Atom, BlockGraph


class EnteringBytes:
    """Bytes of the leaves that a segment reads of blocks on other stages.

    What the denoiser's output uses counts as read by the last block. Each leaf is noted for the cuts between
    its producer and its last reader: few, except for skip connections.
    """

    def __init__(self, graph: BlockGraph) -> None:
        n = len(graph.blocks)
        # Row start, entry length: what blocks [start, start + length) read of blocks before `start`.
        from_before = [[0] * (n - start + 1) for start in range(n)]
        # Row end, entry i: what the blocks from `end` on read of blocks [i, end).
        to_end = [[0] * (end + 1) for end in range(n)]
        for atom, readers in _readers(graph).items():
            num_bytes, producer = graph.spec(atom).num_bytes, graph.index[atom.block]
            for cut in range(producer + 1, readers[-1] + 1):
                first = readers[bisect_left(readers, cut)]
                from_before[cut][first - cut + 1] += num_bytes
                to_end[cut][producer] += num_bytes
        self._from_before = [list(accumulate(row)) for row in from_before]
        self._to_end = [list(accumulate(reversed(row)))[::-1] for row in to_end]

    def before(self, start: int, end: int) -> int:
        """Into blocks [start, end), of what blocks before `start` produced."""
        return self._from_before[start][end - start]

    def around(self, start: int, end: int) -> int:
        """Into the blocks from `end` on, of what blocks [start, end) produced: into Z of a nested split."""
        return self._to_end[end][start]


def _readers(graph: BlockGraph) -> dict[Atom, list[int]]:
    """The positions of the blocks that read each leaf, in execution order."""
    found: dict[Atom, list[int]] = {}
    for position, block in enumerate(graph.blocks):
        for atom in block.reads:
            found.setdefault(atom, []).append(position)
    for atom in graph.output_reads:
        found.setdefault(atom, []).append(len(graph.blocks) - 1)
    return found
