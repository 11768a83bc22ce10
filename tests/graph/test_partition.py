"""Partitions, segments, and what crosses between them."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncdiff.errors import ConfigurationError
from asyncdiff.graph import (
    Atom,
    Block,
    BlockGraph,
    BlockKey,
    Partition,
    TensorSpec,
    crossing_atoms,
    crossing_bytes,
)
from asyncdiff.graph.wiring import wire

A, B, C, D, E = (BlockKey(name) for name in "abcde")


def make_graph(reads: dict[str, str], output_reads: str = "e") -> BlockGraph:
    """Blocks a to e; leaf 0 of each is 1 to 5 floats, leaf 1 no tensor. `reads["c"] = "ab"`: c reads a, b."""
    blocks = tuple(
        Block(
            BlockKey(name), flops=1.0, memory_bytes=1.0, parameter_bytes=1,
            outputs=(TensorSpec((i + 1,), (1,), "float32"), None),
            reads=tuple(Atom(producer, 0, 0) for producer in reads.get(name, "")), inputs=(),
        )
        for i, name in enumerate("abcde")
    )  # fmt: skip
    return BlockGraph(blocks, tuple(Atom(name, 0, 0) for name in output_reads), (), ())


CHAIN = {"b": "a", "c": "b", "d": "c", "e": "da"}


def test_segments_of_a_chain_are_its_stages() -> None:
    segments = Partition("chain", ((A, B), (C,), (D, E))).segments(make_graph(CHAIN))
    assert [(s.index, s.stage, s.blocks) for s in segments] == [(0, 0, (A, B)), (1, 1, (C,)), (2, 2, (D, E))]


def test_segments_of_a_nested_split_are_one_more() -> None:
    partition = Partition("nested", ((A, E), (B, C), (D,)))
    segments = partition.segments(make_graph(CHAIN))
    assert [(s.stage, s.blocks) for s in segments] == [(0, (A,)), (1, (B, C)), (2, (D,)), (0, (E,))]
    assert partition.replicated_stage == 0
    assert Partition("chain", partition.stages).replicated_stage == 2


def test_crossing_is_what_other_stages_read() -> None:
    graph = make_graph(CHAIN)
    chain = Partition("chain", ((A, B), (C,), (D, E))).segments(graph)
    expected = {(0, 1): (Atom("b", 0, 0),), (0, 2): (Atom("a", 0, 0),), (1, 2): (Atom("c", 0, 0),)}
    assert crossing_atoms(graph, chain) == expected
    assert crossing_bytes(graph, chain) == {(0, 1): 8, (0, 2): 4, (1, 2): 12}


def test_what_stays_on_the_outer_device_does_not_cross() -> None:
    """The skip from a to e stays on stage 0 of a nested split."""
    graph = make_graph(CHAIN)
    nested = Partition("nested", ((A, E), (B, C), (D,))).segments(graph)
    assert crossing_bytes(graph, nested) == {(0, 1): 4, (1, 2): 12, (2, 3): 16}


def test_the_output_reads_in_the_last_segment() -> None:
    graph = make_graph({"b": "a", "c": "b", "d": "c", "e": "d"}, output_reads="be")
    chain = Partition("chain", ((A, B), (C, D, E))).segments(graph)
    assert crossing_atoms(graph, chain) == {(0, 1): (Atom("b", 0, 0),)}


@pytest.mark.parametrize(
    ("kind", "stages", "message"),
    [
        ("chain", ((A, B), (C, D)), "misses block e."),
        ("chain", ((A, B, C), (C, D, E)), "repeats block c."),
        ("chain", ((A, B, BlockKey("z", 1)), (C, D, E)), "names unknown block z#1."),
        ("chain", ((A, B, C, D, E), ()), "Stage 1 of the partition has no block. Use fewer stages."),
        ("chain", ((C, D, E), (A, B)), "in the order [0, 1] of execution, but this one visits [1, 0]"),
        ("chain", ((A, E), (B, C, D)), "but this one visits [0, 1, 0]"),
        ("nested", ((A, B), (C, D, E)), "nested partition of 2 stages must visit them in the order [0, 1"),
        ("nested", ((A, C, E), (B, D)), "but this one visits [0, 1, 0, 1, 0]"),
    ],
)  # fmt: skip
def test_wrong_partitions_are_refused(kind: str, stages: tuple, message: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        Partition(kind, stages).segments(make_graph(CHAIN))


@pytest.mark.parametrize(
    ("kind", "stages", "segments"),
    [
        ("chain", ((A, B, C), (), (D, E)), [(0, (A, B, C)), (1, ()), (2, (D, E))]),
        ("chain", ((), (A, B, C, D, E)), [(0, ()), (1, (A, B, C, D, E))]),
        ("nested", ((A, E), (), (B, C, D)), [(0, (A,)), (1, ()), (2, (B, C, D)), (0, (E,))]),
        ("nested", ((A, B), (C, D, E)), [(0, (A, B)), (1, (C, D, E)), (0, ())]),
    ],
)
def test_stages_that_may_idle_keep_their_place(kind: str, stages: tuple, segments: list) -> None:
    found = Partition(kind, stages, may_idle=True).segments(make_graph(CHAIN))
    assert [(segment.stage, segment.blocks) for segment in found] == segments
    assert [segment.index for segment in found] == list(range(len(segments)))


def test_stages_that_may_idle_are_visited_in_order() -> None:
    with pytest.raises(ConfigurationError, match=re.escape("but this one visits [2, 0]")):
        Partition("chain", ((D, E), (), (A, B, C)), may_idle=True).segments(make_graph(CHAIN))


def some_of(names: str, data: st.DataObject) -> str:
    return "".join(data.draw(st.sets(st.sampled_from(names))))


@given(st.data())
def test_wiring_has_each_leaf_once_per_reading_stage(data: st.DataObject) -> None:
    """Counted block by block: leaf -> set of the stages that read it, but are not its own."""
    reads = {name: some_of("abcde"[:i], data) for i, name in enumerate("abcde") if i}
    graph = make_graph(reads, output_reads=some_of("abcde", data))
    partition = data.draw(st.sampled_from([
        Partition("chain", ((A,), (B, C), (D, E))),
        Partition("nested", ((A, E), (B,), (C, D))),
        Partition("nested", ((A, B, E), (C, D))),
        Partition("chain", ((A, B, C, D, E),)),
    ]))  # fmt: skip
    stage_of = partition.stage_of
    last = stage_of[graph.blocks[-1].key]
    expected = {
        (atom, stage_of[block.key]) for block in graph.blocks for atom in block.reads
        if stage_of[block.key] != stage_of[atom.block]
    } | {(atom, last) for atom in graph.output_reads if stage_of[atom.block] != last}  # fmt: skip
    wiring = wire(graph, partition.segments(graph))
    found = [(atom, stage) for (_, stage), entries in wiring.crossing.items() for atom, _ in entries]
    assert sorted(found) == sorted(expected)
    assert set(wiring.segment_of) == set(stage_of)


def test_specs_know_their_size_and_kind() -> None:
    assert TensorSpec((2, 3), (3, 1), "bfloat16").num_bytes == 12
    assert TensorSpec((), (), "float64").num_bytes == 8
    floating = [
        TensorSpec((1,), (1,), name).is_floating for name in ("bfloat16", "complex64", "int64", "bool")
    ]
    assert floating == [True, True, False, False]
    with pytest.raises(KeyError, match="is not a tensor"):
        make_graph(CHAIN).spec(Atom("a", 0, 1))


def test_keys_and_leaves_print_as_paths() -> None:
    assert [str(BlockKey("x.y")), str(BlockKey("x.y", 2)), str(Atom("x.y", 2, 1))] == [
        "x.y",
        "x.y#2",
        "x.y#2[1]",
    ]


def test_leaves_are_ordered_as_produced() -> None:
    graph = make_graph(CHAIN)
    atoms = {Atom("c", 0, 0), Atom("a", 0, 1), Atom("a", 0, 0)}
    assert graph.order(atoms) == (Atom("a", 0, 0), Atom("a", 0, 1), Atom("c", 0, 0))
