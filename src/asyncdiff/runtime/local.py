"""The local executor: every rank in this process, one after the other, on one device.

The reference: it shows the image that N devices would give, and everything else is compared with it bitwise.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping

import torch
from torch import nn

from asyncdiff.graph import TensorSpec
from asyncdiff.graph.wiring import Wiring
from asyncdiff.protocol.messages import WorkerReport
from asyncdiff.runtime.executor import RoundCall, process_report, refuse_aborted
from asyncdiff.runtime.interpreter import RoundTask, StageInterpreter
from asyncdiff.runtime.link import Parcel, Pending
from asyncdiff.stage import AS_THEY_ARE, BlockExecution, StageReplica, StageSpec
from asyncdiff.weights import Skeleton, load_skeleton, named_tensors, resident_bytes


class LocalExecutor:
    """Interprets all ranks; waiting for what a rank has not sent yet runs that rank first."""

    def __init__(self, device: torch.device, *, execution: BlockExecution = AS_THEY_ARE) -> None:
        self._device = device
        self._execution = execution
        self._module: nn.Module | None = None
        self._rank_stages: tuple[int | None, ...] = ()
        self._interpreters: list[StageInterpreter] = []
        self._replicas: dict[int, StageReplica] = {}
        self._not_started: dict[int, RoundTask] = {}
        self._sent: dict[Parcel, torch.Tensor] = {}
        self._expected: dict[Parcel, _LocalPending] = {}
        self._aborted: set[int] = set()

    def install(
        self,
        module: nn.Module,
        skeleton: Skeleton,
        rank_stages: tuple[int | None, ...],
        held: Mapping[int, Collection[str]],
    ) -> None:
        """One replica per stage, over the live module's own tensors."""
        self._module = module
        self._rank_stages = rank_stages
        tensors = dict(named_tensors(module))
        self._replicas = {
            stage: StageReplica(
                load_skeleton(skeleton, tensors), device=self._device, execution=self._execution
            )
            for stage in sorted(stage for stage in set(rank_stages) if stage is not None)
        }
        self._interpreters = [
            StageInterpreter(
                rank,
                rank_stages,
                None if stage is None else self._replicas[stage],
                _LocalLink(self),
                self._device,
            )
            for rank, stage in enumerate(rank_stages)
        ]

    def let_go(self, module: nn.Module) -> None:
        """The stages are made of the live module's own tensors."""

    def prepare(
        self, key: int, specs: Mapping[int, StageSpec], wiring: Wiring, discarded: tuple[int, ...] = ()
    ) -> None:
        for stage, replica in self._replicas.items():
            replica.prepare(key, specs[stage])
        for interpreter in self._interpreters:
            interpreter.wire(key, wiring)
            for old in discarded:
                interpreter.discard(old)

    def end_runs(self, runs: tuple[int, ...]) -> None:
        self._aborted.difference_update(runs)
        for interpreter in self._interpreters:
            interpreter.end_runs(runs)

    def run_round(self, call: RoundCall) -> None:
        refuse_aborted(call.info.run, self._aborted)
        self._not_started = {rank: call.task(rank) for rank in range(len(self._rank_stages))}
        try:
            for rank in range(len(self._rank_stages)):
                self.start(rank)
            unmatched = [*self._sent, *self._expected]
            assert not unmatched, "a transfer of the round had no match"
        except BaseException:
            self._aborted.add(call.info.run)
            raise
        finally:
            self._not_started, self._sent, self._expected = {}, {}, {}

    def start(self, rank: int) -> None:
        """Run a rank's part of the current round unless it was started before."""
        task = self._not_started.pop(rank, None)
        if task is not None:
            self._interpreters[rank].run_round(task)

    def send(self, parcel: Parcel, tensor: torch.Tensor) -> None:
        if parcel in self._expected:
            self._expected.pop(parcel).tensor = tensor
        else:
            self._sent[parcel] = tensor

    def receive(self, from_rank: int, parcel: Parcel) -> Pending:
        pending = _LocalPending(self, from_rank, self._sent.pop(parcel, None))
        if pending.tensor is None:
            self._expected[parcel] = pending
        return pending

    def foretell(self, call: RoundCall) -> None:
        """Rounds are run when they are called."""

    def abandon(self, run: int) -> None:
        self._aborted.add(run)

    def prediction(self, run: int, channel: Hashable, step: int) -> list[torch.Tensor]:
        return self._interpreters[0].prediction(run, channel, step)

    def reports(self, run: int | None) -> list[WorkerReport]:
        assert self._module is not None
        whole = resident_bytes(self._module)
        return [
            process_report(interpreter.take_records(run), 0 if rank else whole)
            for rank, interpreter in enumerate(self._interpreters)
        ]

    def restore(self, module: nn.Module) -> list[str]:
        return []

    def rescue(self, module: nn.Module, names: Collection[str]) -> list[str]:
        return list(names)

    def release(self) -> None:
        pass

    def close(self) -> None:
        self._interpreters, self._replicas = [], {}


class _LocalPending:
    def __init__(self, executor: LocalExecutor, from_rank: int, tensor: torch.Tensor | None) -> None:
        self._executor = executor
        self._from_rank = from_rank
        self.tensor = tensor

    def wait(self) -> torch.Tensor:
        if self.tensor is None:
            self._executor.start(self._from_rank)
        assert self.tensor is not None, f"rank {self._from_rank} waits for its own reader"
        return self.tensor


class _LocalLink:
    def __init__(self, executor: LocalExecutor) -> None:
        self._executor = executor

    def send(self, to_rank: int, parcel: Parcel, tensor: torch.Tensor, spec: TensorSpec) -> None:
        self._executor.send(parcel, tensor)

    def receive(self, from_rank: int, parcel: Parcel, spec: TensorSpec) -> Pending:
        return self._executor.receive(from_rank, parcel)
