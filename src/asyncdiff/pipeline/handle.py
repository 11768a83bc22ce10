"""What `parallelize` returns."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType

from asyncdiff.config import settle_warmup
from asyncdiff.pipeline.division import Division
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

    def __init__(self, division: Division, workers: tuple[WorkerInfo, ...]) -> None:
        self._division = division
        self.workers = workers

    @property
    def plan(self) -> Plan | None:
        """Partition, settings and devices; of the first denoiser where the pipeline has several (`plans`).
        None until its first call, unless it was given: the blocks are found from real inputs."""
        return next(iter(self.plans.values()))

    @property
    def plans(self) -> dict[str, Plan | None]:
        """The plan of each denoiser by its name in the pipeline: `{"transformer": ..., "transformer_2":
        ...}`. `parallelize(pipe, plan=handle.plans)` divides them so again."""
        return self._division.plans()

    @property
    def last_run(self) -> RunReport:
        """Per step and device, what happened in the last run, also where one denoiser hands over to another
        in the middle of it; `ParallelizedError` before the first one. A pipeline that sets the timesteps
        twice (a prior, then a decoder) makes two runs."""
        return self._division.report()

    def set(self, *, warmup_steps: int | str, tolerance: float | None = None) -> None:
        """Change how many steps run in order, from the next run on: as `parallelize` takes them;
        `ConfigurationError` below 1."""
        self._division.set(*settle_warmup(warmup_steps, tolerance))

    def remove(self) -> None:
        """Give the pipeline back as it was: its weights, its methods; end the workers. Safe to call twice.

        `WeightsLostError` names weights that only a dead worker held and that no file gives back.
        """
        self._division.remove()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
