"""Workers that several tests share; makes the modules beside this one importable, in the workers too."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from asyncdiff.launch.spawn import SpawnedWorkers
from asyncdiff.pipeline import front_door
from asyncdiff.runtime.control import WorkerConnection
from asyncdiff.runtime.remote import WorkerUsers

sys.path.insert(0, str(Path(__file__).parent))


class SharedWorkers:
    """The first of some workers that outlive a handle, as torchrun's do: starting two takes five seconds."""

    is_local = True

    def __init__(self, workers: SpawnedWorkers, count: int) -> None:
        self._workers = workers
        self._count = count

    @property
    def connections(self) -> dict[int, WorkerConnection]:
        return {rank: self._workers.connections[rank] for rank in range(1, self._count + 1)}

    @property
    def users(self) -> WorkerUsers:
        return self._workers.users

    def kill(self, rank: int) -> None:
        self._workers.kill(rank)

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def workers(request: pytest.FixtureRequest) -> Iterator[SpawnedWorkers]:
    """Two, or as many as the module's `NUM_WORKERS` says."""
    started = SpawnedWorkers([1] * getattr(request.module, "NUM_WORKERS", 2))
    yield started
    started.close()


@pytest.fixture
def spawned(workers: SpawnedWorkers, monkeypatch: pytest.MonkeyPatch) -> None:
    """`parallelize` takes the workers that are there already."""
    monkeypatch.setattr(front_door, "SpawnedWorkers", lambda threads: SharedWorkers(workers, len(threads)))
