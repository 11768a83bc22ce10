"""A process of its own that holds the whole denoiser and times its steps: the reference and the machine's
ceiling.

Started as `python -m asyncdiff.bench.whole_model`; speaks JSON lines over its standard streams.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import TYPE_CHECKING, Any

from asyncdiff.errors import AsyncDiffError

if TYPE_CHECKING:
    from asyncdiff.bench.timed_run import TimedRun
    from asyncdiff.bench.workload import Workload


class WholeModelProcess:
    """One process with the whole model on its device; a CPU device is as many cores as a run has threads."""

    def __init__(self, workload: Workload, device: str = "cpu") -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "asyncdiff.bench.whole_model"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            start_new_session=True,
        )
        self._say({"workload": asdict(workload), "device": device})

    def wait_ready(self) -> None:
        self._hear()

    def start(self, steps: int, threads: int | None = 1) -> None:
        """Begin a run of `steps` steps; `result` waits for it. `threads`: None leaves their number alone."""
        self._say({"steps": steps, "threads": threads})

    def result(self) -> TimedRun:
        """The run that `start` began."""
        from asyncdiff.bench.timed_run import TimedRun

        return TimedRun.from_json(self._hear()["run"])

    def measure(self, steps: int, threads: int | None = 1) -> TimedRun:
        self.start(steps, threads)
        return self.result()

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate(timeout=10)  # closes the pipes too

    def __enter__(self) -> WholeModelProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _say(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        return dict(json.loads(line))

    def _ended(self) -> AsyncDiffError:
        return AsyncDiffError(f"The reference process ended with exit code {self._process.wait(10)}.")


def measure_together(
    wholes: Sequence[WholeModelProcess],
    steps: int,
    threads: int | None = 1,
    here: Callable[[int], TimedRun] | None = None,
) -> list[TimedRun]:
    """One run of each at the same time: what the machine can do at once, shared memory and heat included.
    `here`: from a number of steps to a run in this process, which comes first in the list."""
    for whole in wholes:
        whole.start(steps, threads)
    own = [] if here is None else [here(steps)]
    return own + [whole.result() for whole in wholes]


def main() -> None:
    import torch

    from asyncdiff.bench.workload import Workload, load, run_timed
    from asyncdiff.runtime.allocator import keep_freed_memory

    keep_freed_memory()  # as in workers
    request = json.loads(sys.stdin.readline())
    subject = load(Workload(**request["workload"]), request["device"])
    _answer({"ready": True})
    for line in sys.stdin:
        order = json.loads(line)
        if order["threads"] is not None:
            torch.set_num_threads(order["threads"])
        _answer({"run": run_timed(subject, order["steps"]).to_json()})


def _answer(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
