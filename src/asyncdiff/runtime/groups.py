"""Groups of devices, each of which has the whole denoiser divided among its workers.

The driver holds stage 0 of the first group, or no stage at all; of the others it only takes predictions. Each
group has an executor, with ranks, states and transport of its own, so that nothing in a group depends on
another.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence

import torch
from torch import nn

from asyncdiff.graph.wiring import Wiring
from asyncdiff.protocol.messages import WorkerReport
from asyncdiff.runtime.executor import Executor, RoundCall
from asyncdiff.stage import StageSpec
from asyncdiff.weights import Skeleton


class Groups:
    """One executor per group. What is asked of all is asked of each in turn. `driver_computes`: whether the
    driver holds stage 0 of the first one."""

    def __init__(self, executors: Sequence[Executor], *, driver_computes: bool = True) -> None:
        self.executors = tuple(executors)
        self._driver_computes = driver_computes

    def driver_computes_in(self, group: int) -> bool:
        return group == 0 and self._driver_computes

    @property
    def first(self) -> Executor:
        """The group that the driver computes in."""
        return self.executors[0]

    def install(
        self,
        module: nn.Module,
        skeleton: Skeleton,
        rank_stages: tuple[int, ...],
        held: Mapping[int, Collection[str]],
    ) -> None:
        """As `Executor.install`; `rank_stages`: of the first group."""
        for executor in self.executors[1:]:
            executor.install(module, skeleton, (None, *rank_stages), held)
        # The last, because it frees what it ships.
        if self._driver_computes:
            self.first.install(module, skeleton, rank_stages, held)
        else:
            self.first.install(module, skeleton, (None, *rank_stages), held)
            self.first.let_go(module)

    def prepare(
        self, key: int, specs: Mapping[int, StageSpec], wiring: Wiring, discarded: tuple[int, ...] = ()
    ) -> None:
        for executor in self.executors:
            executor.prepare(key, specs, wiring, discarded)

    def end_runs(self, runs: tuple[int, ...]) -> None:
        for executor in self.executors:
            executor.end_runs(runs)

    def run_rounds(self, run: int, calls: Mapping[int, Sequence[RoundCall]]) -> None:
        """Start rounds in each of these groups, one after the other; returns when this process's own part is
        done."""
        try:
            for group in sorted(calls, reverse=True):  # the others compute while this process does
                for call in calls[group]:
                    self.executors[group].run_round(call)
        except BaseException:
            self._abandon(run)
            raise

    def foretell(self, group: int, call: RoundCall) -> None:
        """As `Executor.foretell`, of one group."""
        self.executors[group].foretell(call)

    def predictions(
        self, run: int, channels: Sequence[tuple[int, Hashable]], step: int
    ) -> list[list[torch.Tensor]]:
        """The tensor leaves of a prediction of a started round of each of these groups and channels, waited
        for."""
        try:
            return [self.executors[group].prediction(run, channel, step) for group, channel in channels]
        except BaseException:
            self._abandon(run)
            raise

    def _abandon(self, run: int) -> None:
        """A run that one group cannot go on with is over in all."""
        for executor in self.executors:
            executor.abandon(run)

    def reports(self, run: int | None) -> list[WorkerReport]:
        """Per rank of all groups, the driver once."""
        first, *others = (executor.reports(run) for executor in self.executors)
        return [*first, *(report for reports in others for report in reports[1:])]

    def restore(self, module: nn.Module) -> list[str]:
        """As `Executor.restore`; what a group has lost, another still has."""
        lost = self.first.restore(module)
        for executor in self.executors[1:]:
            if lost:
                lost = executor.rescue(module, lost)
        for executor in self.executors[1:]:
            executor.release()
        return lost

    def close(self) -> None:
        for executor in reversed(self.executors):
            executor.close()
