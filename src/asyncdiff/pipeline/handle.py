"""What `parallelize` returns."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType

from asyncdiff.config import check_count
from asyncdiff.pipeline.installation import Installation
from asyncdiff.pipeline.report import RunReport
from asyncdiff.planner import Plan


@dataclass(frozen=True)
class WorkerInfo:
    """A worker process: its rank, device, process id and host name."""

    rank: int
    device: str
    pid: int
    host: str


class Handle:
    """A parallelized pipeline. Also a context manager that removes itself at the end."""

    def __init__(self, installation: Installation, workers: tuple[WorkerInfo, ...]) -> None:
        self._installation = installation
        self.workers = workers

    @property
    def plan(self) -> Plan | None:
        """Partition, settings and devices. None until the first denoiser call, unless it was given: the
        blocks are found from real inputs."""
        return self._installation.plan

    @property
    def last_run(self) -> RunReport:
        """Per step and device, what happened in the last run; `ParallelizedError` before the first one."""
        return self._installation.report()

    def set(self, *, warmup_steps: int) -> None:
        """Change how many steps run in order, from the next run on; `ConfigurationError` below 1."""
        self._installation.set(check_count("warmup_steps", warmup_steps))

    def remove(self) -> None:
        """Give the pipeline back as it was: its weights, its methods; end the workers. Safe to call twice.

        `WeightsLostError` names weights that only a dead worker held and that no file gives back.
        """
        self._installation.remove()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
