"""What the driver asks of whoever runs the stages: in this process, or in workers."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import psutil
import torch
from torch import nn

from asyncdiff.errors import ParallelizedError
from asyncdiff.graph.wiring import Wiring
from asyncdiff.protocol.messages import RoundInfo, WorkerReport
from asyncdiff.runtime.interpreter import RoundTask
from asyncdiff.schedule import Compute, Round
from asyncdiff.stage import StageSpec
from asyncdiff.weights import Skeleton


@dataclass(frozen=True)
class RoundCall:
    """One round for all ranks, with every tensor input of the call that starts it.

    `continued`: what stands in for some of them in evaluations with one of these `latents_step`s. It is made
    when a rank is given it, so a worker that reads the call's own inputs need not wait for it.
    `following`: finds out the round that will come next if all goes as before, with the inputs that are known
    already (None where nobody can tell); asked when the workers have this one.
    """

    info: RoundInfo
    round: Round
    tensors: Mapping[str, torch.Tensor]
    continued: Mapping[int, Callable[[], Mapping[str, torch.Tensor]]] = field(default_factory=dict)
    following: Callable[[], RoundCall | None] | None = None

    def task(self, rank: int) -> RoundTask:
        """The part of one rank that is in this process."""
        return RoundTask(self.info, self.round.ops[rank], self.tensors_of(rank))

    def tensors_of(self, rank: int) -> Mapping[str, torch.Tensor]:
        """The tensor inputs that a rank is given: a rank evaluates for one step in a round."""
        steps = {op.latents_step for op in self.round.ops[rank] if isinstance(op, Compute)}
        replaced = [self.continued[step]() for step in steps if step in self.continued]
        return {**self.tensors, **replaced[0]} if replaced else self.tensors


class Executor(Protocol):
    """Holds the stages and runs rounds."""

    def install(
        self,
        module: nn.Module,
        skeleton: Skeleton,
        rank_stages: tuple[int | None, ...],
        held: Mapping[int, Collection[str]],
    ) -> None:
        """Build the stages from the live module. Rank r runs stage `rank_stages[r]`, rank 0 perhaps none;
        `held`: stage -> names of the tensors it must hold."""

    def let_go(self, module: nn.Module) -> None:
        """Of a driver that holds no stage: free the live module's tensors, all of which have been installed
        elsewhere; `restore` gives them back."""

    def prepare(
        self, key: int, specs: Mapping[int, StageSpec], wiring: Wiring, discarded: tuple[int, ...] = ()
    ) -> None:
        """Install the stubs for an input structure. `specs`: stage -> its spec. `discarded`: keys that no
        round will be of any more, unless they are prepared again."""

    def end_runs(self, runs: tuple[int, ...]) -> None:
        """Nothing of these runs will be asked for any more."""

    def run_round(self, call: RoundCall) -> None:
        """Start a round; returns when this process's own part is done."""

    def foretell(self, call: RoundCall) -> None:
        """The round that will probably be run next, before its call: workers may begin with it. Nothing
        depends on it being right but time."""

    def abandon(self, run: int) -> None:
        """The run cannot go on: what is left of its rounds is not computed, and more are refused."""

    def prediction(self, run: int, channel: Hashable, step: int) -> list[torch.Tensor]:
        """The tensor leaves of a prediction of a started round, waited for."""

    def reports(self, run: int | None) -> list[WorkerReport]:
        """Per rank, what was recorded of a run and the memory held now."""

    def restore(self, module: nn.Module) -> list[str]:
        """Give the weights back to the live module; the names of those that are lost."""

    def rescue(self, module: nn.Module, names: Collection[str]) -> list[str]:
        """Give tensors that another group has lost to the live module; the names of those not held here."""

    def release(self) -> None:
        """Of a group whose driver holds no stage: weights may be changed from now on, and are those of the
        live module when `install` is called again."""

    def close(self) -> None:
        """Let go of the stages. Safe to call twice."""


def refuse_aborted(run: int, aborted: Collection[int]) -> None:
    """`ParallelizedError` for a run whose states are gone: an error or Ctrl-C ended one of its steps."""
    if run in aborted:
        raise ParallelizedError(
            "An earlier step of this run was ended by an error or an interrupt, so the run cannot go on. "
            "Call the pipeline again."
        )


def process_report(interpreter_records: tuple, weight_bytes: int) -> WorkerReport:
    """A report of this process."""
    return WorkerReport(
        rounds=interpreter_records,
        weight_bytes=weight_bytes,
        resident_bytes=resident_bytes_of_process(),
        cpu_s=time.process_time(),
        device_peak_bytes=device_peak_bytes_of_process(),
    )


def resident_bytes_of_process() -> int:
    """Resident set size of this process in bytes, now."""
    return int(psutil.Process().memory_info().rss)


def device_peak_bytes_of_process() -> int:
    """The most that this process has held on CUDA devices since the peak was last reset; 0 without CUDA."""
    if not torch.cuda.is_initialized():
        return 0
    return sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))
