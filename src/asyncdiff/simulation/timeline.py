"""What happened when on which worker: of a simulated run or of a recorded one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMPUTE = "compute"
WAIT = "wait"
TRANSFER = "transfer"
DRIVER = "driver"  # the pipeline's own work between predictions: guidance, noise scheduler, callbacks


@dataclass(frozen=True)
class Span:
    """`name` ran on `rank` from `start_s` to `end_s` (seconds since the run began).

    `category` is `"compute"`, `"wait"`, `"transfer"` (on the sender's row, overlapping the rest) or
    `"driver"`.
    """

    rank: int
    name: str
    start_s: float
    end_s: float
    category: str

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True)
class Timeline:
    """The spans of one run.

    `total_s`: from its beginning to its end. `step_seconds`: how long the pipeline took for each step, one
    entry per step; empty where it was not recorded.
    """

    spans: tuple[Span, ...]
    total_s: float
    step_seconds: tuple[float, ...] = ()

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted({span.rank for span in self.spans}))

    def seconds(self, rank: int, category: str) -> float:
        """The sum of a rank's spans of one category."""
        return sum(span.seconds for span in self.spans if span.rank == rank and span.category == category)

    def compute_s(self, rank: int) -> float:
        """How long a rank computed."""
        return self.seconds(rank, COMPUTE)

    def wait_s(self, rank: int) -> float:
        """How long a rank waited between its computations."""
        return self.seconds(rank, WAIT)

    def write_trace(self, path: str | Path) -> None:
        """Write the run for chrome://tracing or https://ui.perfetto.dev."""
        write_traces(path, {"run": self})


def write_traces(path: str | Path, timelines: Mapping[str, Timeline]) -> None:
    """Write several runs into one trace, one process row per run: a simulated one over a recorded one."""
    events = [
        event
        for process, (name, timeline) in enumerate(timelines.items())
        for event in trace_events(timeline, name, process)
    ]
    Path(path).write_text(json.dumps({"displayTimeUnit": "ms", "traceEvents": events}), encoding="utf-8")


def trace_events(timeline: Timeline, name: str, process: int) -> list[dict[str, Any]]:
    """The events of one run in Chrome's Trace Event Format: times in microseconds, one row per rank.

    Transfers overlap with what else a worker does, so they have rows of their own below the workers'.
    """
    events: list[dict[str, Any]] = [_metadata("process_name", name, process, 0)]
    for rank in timeline.ranks:
        events.append(_metadata("thread_name", f"rank {rank}", process, 2 * rank))
        if any(span.rank == rank and span.category == TRANSFER for span in timeline.spans):
            events.append(_metadata("thread_name", f"rank {rank} sends", process, 2 * rank + 1))
    return events + [_complete_event(span, process) for span in timeline.spans]


def _metadata(kind: str, name: str, process: int, thread: int) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}


def _complete_event(span: Span, process: int) -> dict[str, Any]:
    return {
        "name": span.name, "cat": span.category, "ph": "X", "pid": process,
        "tid": 2 * span.rank + (span.category == TRANSFER), "ts": span.start_s * 1e6, "dur": span.seconds *
        1e6,
    }  # fmt: skip
