"""All denoisers of one pipeline, divided over the same devices.

Each has an installation and an executor of its own, with its own plan, states and transport, as two handles
have; what they share are the worker processes, a lock, and the guards of the pipeline. One executor for all
would save connections, and make every message and every table say which denoiser it is about.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from asyncdiff.errors import ParallelizedError, WeightsLostError
from asyncdiff.pipeline.guards import install_guards, remove_guards
from asyncdiff.pipeline.installation import Installation
from asyncdiff.pipeline.report import RunReport, build_report
from asyncdiff.planner import Plan
from asyncdiff.protocol.messages import WorkerReport


class Division:
    """`lock`: the one that the installations hold during a call. `close_workers`: called once all are out.
    `controlnet`: beside the denoisers, on the last device."""

    def __init__(
        self,
        pipe: Any,
        installations: Sequence[Installation],
        devices: tuple[str, ...],
        lock: threading.RLock,
        close_workers: Callable[[], None],
        controlnet: Installation | None = None,
    ) -> None:
        self.installations = tuple(installations)
        self._controlnet = controlnet
        self._pipe = pipe
        self._devices = devices
        self._lock = lock
        self._close_workers = close_workers

    def install(self) -> None:
        """Put every denoiser's stand-in in its place."""
        for installation in self._all:
            installation.install()
        self._install_guards()

    def remove(self) -> None:
        """Give the pipeline back as it was, also where one of its denoisers cannot be."""
        remove_guards(self._pipe)
        lost: list[str] = []

        def remove(installation: Installation) -> None:
            try:
                installation.remove()
            except WeightsLostError as error:
                lost.append(str(error))

        with ExitStack() as stack:  # whatever one of them raises, the others are removed
            stack.callback(self._close_workers)
            for installation in reversed(self._all):
                stack.callback(remove, installation)
        if lost:
            raise WeightsLostError(" ".join(lost))

    @property
    def _all(self) -> tuple[Installation, ...]:
        return self.installations if self._controlnet is None else (*self.installations, self._controlnet)

    def _install_guards(self) -> None:
        first = self.installations[0]
        install_guards(self._pipe, first.device, first.dtype, self)

    # -- what guards need to know ----------------------------------------------------------------------------

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """As `Installation.whole_weights`, of all denoisers: a pipeline's LoRA may have weights for each."""
        with self._lock, ExitStack() as stack:
            for installation in self._all:
                stack.enter_context(installation.whole_weights())
            remove_guards(self._pipe)
            try:
                yield
            finally:
                self._install_guards()

    def note_change(self) -> None:
        for installation in self._all:
            installation.note_change()

    # -- what a handle tells ---------------------------------------------------------------------------------

    def plans(self) -> dict[str, Plan | None]:
        return {installation.name: installation.plan for installation in self.installations}

    def set(self, warmup_steps: int, tolerance: float | None) -> None:
        for installation in self.installations:
            installation.set(warmup_steps, tolerance)
        if self._controlnet is not None:
            self._controlnet.set(warmup_steps, None)

    def report(self) -> RunReport:
        """The run of the last denoiser call, over all denoisers; `ParallelizedError` before the first one."""
        with self._lock:
            called = [each for each in self.installations if each.last_call is not None]
            _, run = max((each.last_call for each in called if each.last_call is not None), default=(0.0, -1))
            records = [each.recorded(run) for each in called]
            if not any(record.calls for record in records):
                raise ParallelizedError("There is no run to report yet: call the pipeline first.")
            return build_report(records, self._devices, self._beside(run))

    def _beside(self, run: int) -> list[WorkerReport]:
        """Of the ranks that have no part of the denoisers."""
        if self._controlnet is None:
            return []
        if self._controlnet.last_call is None:  # a pipeline without it that shares the denoiser
            return [WorkerReport((), 0, 0, 0.0)]
        return self._controlnet.groups.reports(run)[1:]
