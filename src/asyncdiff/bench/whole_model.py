"""A process of its own that holds a whole denoiser and times its steps: the reference and the machine's
ceiling.

Started as `python -m asyncdiff.bench.whole_model`; speaks JSON lines over its standard streams.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from types import TracebackType
from typing import Any

from asyncdiff.errors import AsyncDiffError


class WholeModelProcess:
    """One process with the whole denoiser on its CPU core."""

    def __init__(self, arch: str, size: int, dtype: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "asyncdiff.bench.whole_model"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            start_new_session=True,
        )
        self._say({"arch": arch, "size": size, "dtype": dtype})

    def wait_ready(self) -> None:
        self._hear()

    def start(self, steps: int, threads: int = 1) -> None:
        """Begin timing `steps` steps; `result` waits for them."""
        self._say({"steps": steps, "threads": threads})

    def result(self) -> list[float]:
        """Seconds of each step."""
        return list(self._hear()["seconds"])

    def measure(self, steps: int, threads: int = 1) -> list[float]:
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
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise AsyncDiffError(f"The reference process ended with exit code {self._process.wait(10)}.")
        return dict(json.loads(line))


def main() -> None:
    import torch

    from asyncdiff.bench.architectures import DenoisingLoop, architecture_named, build_denoiser

    request = json.loads(sys.stdin.readline())
    architecture, dtype = architecture_named(request["arch"]), getattr(torch, request["dtype"])
    loop = DenoisingLoop(architecture, build_denoiser(architecture, dtype), request["size"], dtype)
    _answer({"ready": True})
    for line in sys.stdin:
        order = json.loads(line)
        torch.set_num_threads(order["threads"])
        _answer({"seconds": _time_steps(loop, order["steps"])})


def _time_steps(loop: Any, steps: int) -> list[float]:
    ends: list[float] = [time.perf_counter()]
    loop(steps, lambda step: ends.append(time.perf_counter()))
    return [after - before for before, after in itertools.pairwise(ends)]


def _answer(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
