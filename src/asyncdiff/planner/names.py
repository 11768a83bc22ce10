"""A partition written by hand: lists of module names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from asyncdiff.errors import ConfigurationError
from asyncdiff.graph import Atom, BlockGraph, BlockKey, Partition


def partition_by_names(graph: BlockGraph, stages: Sequence[Sequence[str]]) -> Partition:
    """The partition in which stage k holds the blocks that `stages[k]` names; their order tells its kind.

    A name is a module's dotted path and covers every block at or below it; `path#1` is the second call of the
    block `path` alone, and then `path` covers the calls that nobody names so. Raises `ConfigurationError`
    for a name that covers nothing, for a block that is covered by no name or by several, and for stages that
    are neither a chain nor nested.
    """
    names = [(name, stage) for stage, listed in enumerate(stages) for name in listed]
    calls = {name for name, _ in names if "#" in name}
    owners = {block.key: _owners(block.key, names, calls) for block in graph.blocks}
    _check_names(graph, names, owners)
    _check_owners(owners)
    homes = {key: found[0][1] for key, found in owners.items()}
    keys = tuple(tuple(key for key, home in homes.items() if home == stage) for stage in range(len(stages)))
    last = homes[graph.blocks[-1].key]
    partition = Partition("nested" if last == 0 and len(stages) > 1 else "chain", keys)
    partition.validate(graph)
    return partition


def block_name(key: BlockKey, graph: BlockGraph) -> str:
    """The name that covers exactly this block, as `partition_by_names` reads it."""
    repeated = BlockKey(key.path, 1) in graph.index
    return f"{key.path}#{key.call}" if repeated else str(key)


def _owners(key: BlockKey, names: list[tuple[str, int]], calls: set[str]) -> list[tuple[str, int]]:
    """The (name, stage) pairs that cover a block."""
    exact = f"{key.path}#{key.call}"
    if exact in calls:
        return [(name, stage) for name, stage in names if name == exact]
    return [(name, stage) for name, stage in names if key.path == name or key.path.startswith(f"{name}.")]


def _check_names(
    graph: BlockGraph, names: list[tuple[str, int]], owners: dict[BlockKey, list[tuple[str, int]]]
) -> None:
    used = {name for found in owners.values() for name, _ in found}
    for name, stage in names:
        if name not in used:
            paths = sorted(_paths(graph))
            close = difflib.get_close_matches(name, paths, n=3) or paths[:3]
            raise ConfigurationError(
                f"Stage {stage} of the partition names {name!r}, which is no block and contains none. "
                f"Perhaps {' or '.join(close)}?"
            )


def _paths(graph: BlockGraph) -> set[str]:
    """The paths of all blocks and of the modules that contain them."""
    parts = [block.key.path.split(".") for block in graph.blocks]
    return {".".join(path[:depth]) for path in parts for depth in range(1, len(path) + 1)}


def _check_owners(owners: dict[BlockKey, list[tuple[str, int]]]) -> None:
    for key, found in owners.items():
        if len(found) > 1:
            where = ", ".join(f"{name!r} of stage {stage}" for name, stage in found)
            raise ConfigurationError(
                f"The partition repeats block {key}: it is covered by {where}. "
                f"Every block must be on exactly one stage."
            )
    missing = [str(key) for key, found in owners.items() if not found]
    if missing:
        raise ConfigurationError(
            f"The partition misses block{'s' * (len(missing) > 1)} {', '.join(missing[:5])}"
            f"{' ...' * (len(missing) > 5)}. Every block must be on exactly one stage."
        )


def atom_of(name: str) -> Atom:
    """The leaf that `str(atom)` names, such as `down_blocks.0[1]`; `ConfigurationError` for anything else."""
    match = re.fullmatch(r"(?P<path>[^#\[\]]+)(#(?P<call>\d+))?\[(?P<leaf>\d+)\]", name)
    if match is None:
        raise ConfigurationError(
            f"{name!r} is no leaf of a block: write its module's name and the number of the output, such as "
            "'conv_in[0]'."
        )
    return Atom(match["path"], int(match["call"] or 0), int(match["leaf"]))
