"""Rounds that are announced before their call: which workers can go ahead, and whether the guess was right.

A worker whose stage reads no latents knows everything it needs for the next step when it is done with this
one: states come from other workers, the prompt's embedding has not changed, and the next timestep stands in
the noise scheduler's list. It need not wait for the noise scheduler and for the call that follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from asyncdiff.protocol.messages import Condition, RoundInfo
from asyncdiff.runtime.executor import RoundCall
from asyncdiff.schedule.ops import Compute, Op, Recv

_COMPARED_BYTES = 1024


@dataclass(frozen=True)
class Announcement:
    """A round that some ranks have been told of. `expected`: the inputs they were given, with versions.
    `may_wait`: to compare them, a device may be waited for, which has nothing else to do."""

    call: RoundCall
    ranks: frozenset[int]
    expected: Mapping[str, tuple[torch.Tensor, int]]
    may_wait: bool = False

    def came_true(self, call: RoundCall) -> bool:
        """Whether the round that is called is the one that was announced, with the same inputs."""
        return (
            call.round is self.call.round
            and _is_same_info(call.info, self.call.info)
            and all(
                name in call.tensors and _is_same(*expected, call.tensors[name], self.may_wait)
                for name, expected in self.expected.items()
            )
        )


def announce(
    call: RoundCall,
    needed: Mapping[int, Sequence[str]],
    rank_stages: Sequence[int | None],
    *,
    may_wait: bool = False,
) -> Announcement | None:
    """Which ranks can be told of a round of which only `call.tensors` is known; None where none can.

    `needed`: the inputs that each stage reads. A rank that would wait in the round for one that is not told
    is none of them, unless that is the driver's, which will be waited for only until it asks for anything
    else: whatever becomes of the round, nobody is stuck in it.
    """
    ranks = {
        rank
        for rank, ops in enumerate(call.round.ops)
        if rank > 0
        and any(isinstance(op, Compute) for op in ops)
        and all(name in call.tensors for name in _needed_by(rank, needed, rank_stages))
    }
    while waiting := {rank for rank in ranks if not _waits_for(call.round.ops[rank]) <= ranks | {0}}:
        ranks -= waiting
    if not ranks:
        return None
    names = {name for rank in ranks for name in _needed_by(rank, needed, rank_stages)}
    expected = {name: (call.tensors[name], version_of(call.tensors[name])) for name in names}
    return Announcement(call, frozenset(ranks), expected, may_wait)


def _needed_by(
    rank: int, needed: Mapping[int, Sequence[str]], rank_stages: Sequence[int | None]
) -> Sequence[str]:
    stage = rank_stages[rank]
    return () if stage is None else needed[stage]


def version_of(tensor: torch.Tensor) -> int:
    """Changes when something is written into the tensor; -1 for inference tensors, which do not count."""
    return -1 if tensor.is_inference() else tensor._version


def _waits_for(ops: Sequence[Op]) -> set[int]:
    """The ranks from which something must arrive before all is computed."""
    last = max(index for index, op in enumerate(ops) if isinstance(op, Compute))
    return {op.from_rank for op in ops[:last] if isinstance(op, Recv)}


def _is_same_info(called: RoundInfo, announced: RoundInfo) -> bool:
    ours, theirs = called.conditions, announced.conditions
    return (
        replace(called, conditions={}, history_depth=0) == replace(announced, conditions={}, history_depth=0)
        and ours.keys() == theirs.keys()
        and all(_is_same_condition(ours[step], theirs[step]) for step in ours)
    )


def _is_same_condition(one: Condition, other: Condition) -> bool:
    return one.latents_scale == other.latents_scale and _is_equal(one.timestep, other.timestep)


def _is_same(expected: torch.Tensor, version: int, tensor: torch.Tensor, may_wait: bool) -> bool:
    """The same object, not written to since; or a tensor with the same elements, which where nobody may wait
    is a small one (a timestep)."""
    if tensor is expected:
        return version_of(tensor) == version
    if may_wait and version_of(expected) == version >= 0 and tensor.device == expected.device:
        return _has_layout_of(tensor, expected) and torch.equal(tensor, expected)
    return _is_equal(tensor, expected)


def _has_layout_of(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())


def _is_equal(one: Any, other: Any) -> bool:
    """Bitwise, for numbers and for tensors that can be looked at without waiting for a device."""
    if one is other:
        return True
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return type(one) is type(other) and bool(one == other)
    return (
        one.device.type == other.device.type == "cpu"
        and one.nbytes <= _COMPARED_BYTES
        and _has_layout_of(one, other)
        and torch.equal(one, other)
    )
