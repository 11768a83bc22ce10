"""Small block graphs, written down by hand."""

from __future__ import annotations

from asyncdiff.graph import Atom, Block, BlockGraph, BlockKey, TensorSpec


def make_graph(
    seconds: list[float],
    reads: list[list[int]],
    output_reads: list[int],
    sizes: list[int],
    glue: float = 0.0,
    weights: list[int] | None = None,
) -> BlockGraph:
    """Blocks b0, b1, ... of one output leaf each; `reads[i]`: positions of the blocks that b_i reads."""
    blocks = tuple(
        Block(
            key=BlockKey(f"b{i}"),
            flops=cost,
            memory_bytes=0.0,
            parameter_bytes=weights[i] if weights else 10,
            outputs=(TensorSpec((size,), (1,), "float32"),),
            reads=tuple(Atom(f"b{producer}", 0, 0) for producer in sorted(set(producers))),
            inputs=(),
            seconds=cost,
        )
        for i, (cost, producers, size) in enumerate(zip(seconds, reads, sizes, strict=True))
    )
    outputs = tuple(Atom(f"b{producer}", 0, 0) for producer in sorted(set(output_reads)))
    return BlockGraph(blocks, outputs, (), (), glue_flops=glue)
