"""Which values must be handed over for the reads of a schedule, and where in each worker's list."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from asyncdiff.schedule.ops import Compute, Op, Predict, Recv, Send, SendPrediction, Value
from asyncdiff.schedule.rounds import Round


@dataclass(frozen=True)
class Draft:
    """A round before its transfers: (rank, computation) in execution order."""

    steps: tuple[int, ...]
    in_order: bool
    computes: tuple[tuple[int, Compute], ...]


@dataclass
class _Transfers:
    """Where values come from and go to. `readers[value]`: rank -> round that first reads it there."""

    home: dict[Value, tuple[int, int]] = field(default_factory=dict)  # value -> (round, rank) producing it
    readers: dict[Value, dict[int, int]] = field(default_factory=lambda: defaultdict(dict))


def place_transfers(drafts: list[Draft], num_ranks: int, last_segment: int) -> tuple[Round, ...]:
    """The rounds with sends, receives and predictions.

    A value goes to each other rank that reads it, once, in the round in which it is produced: sent directly
    after the computation, received before its first use in the same round, else at the end of the round.
    """
    transfers = _find_transfers(drafts)
    return tuple(
        _place_in_round(index, draft, transfers, num_ranks, last_segment)
        for index, draft in enumerate(drafts)
    )


def _find_transfers(drafts: list[Draft]) -> _Transfers:
    transfers = _Transfers()
    for index, draft in enumerate(drafts):
        for rank, compute in draft.computes:
            transfers.home[compute.value] = (index, rank)
            for read in compute.reads:
                for term in read.terms:
                    transfers.readers[term.value].setdefault(rank, index)
    return transfers


def _place_in_round(
    index: int, draft: Draft, transfers: _Transfers, num_ranks: int, last_segment: int
) -> Round:
    ops: list[list[Op]] = [[] for _ in range(num_ranks)]
    received: set[tuple[int, Value]] = set()
    for rank, compute in draft.computes:
        for value in _needed_now(index, rank, compute, transfers):
            if (rank, value) not in received:
                received.add((rank, value))
                ops[rank].append(Recv(value, transfers.home[value][1]))
        ops[rank].append(compute)
        # Sends come directly after: listed later, the reader would wait for this worker's next work.
        ops[rank].extend(Send(compute.value, to) for to in _receivers(compute.value, transfers))
        if compute.segment == last_segment and rank != 0:
            ops[rank].append(SendPrediction(compute.step))
    for rank, value in _needed_later(index, draft, transfers):
        ops[rank].append(Recv(value, transfers.home[value][1]))
    ops[0].extend(
        Predict(compute.step, rank) for rank, compute in draft.computes if compute.segment == last_segment
    )
    return Round(draft.steps[0], draft.steps, draft.in_order, tuple(map(tuple, ops)))


def _needed_now(index: int, rank: int, compute: Compute, transfers: _Transfers) -> list[Value]:
    """What this computation reads of what another rank produces in the same round."""
    values = (term.value for read in compute.reads for term in read.terms)
    return [value for value in values if _is_foreign(transfers.home[value], index, rank)]


def _is_foreign(home: tuple[int, int], index: int, rank: int) -> bool:
    return home[0] == index and home[1] != rank


def _needed_later(index: int, draft: Draft, transfers: _Transfers) -> list[tuple[int, Value]]:
    """(rank, value) for what is produced in this round and first read in a later one."""
    return [
        (rank, compute.value)
        for _, compute in draft.computes
        for rank in _receivers(compute.value, transfers)
        if transfers.readers[compute.value][rank] > index
    ]


def _receivers(value: Value, transfers: _Transfers) -> list[int]:
    return [rank for rank in sorted(transfers.readers.get(value, ())) if rank != transfers.home[value][1]]
