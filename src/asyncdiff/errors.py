"""The errors a user of asyncdiff can meet.

User mistakes are `ConfigurationError`s (a `ValueError`), raised before any process is started or any weight
is moved. What goes wrong while a generation runs is a `RuntimeError`.
"""


class AsyncDiffError(Exception):
    """Anything that asyncdiff raises on purpose."""


class ConfigurationError(AsyncDiffError, ValueError):
    """What was asked for cannot be done: says what was asked, the numbers, the rule and the way out."""


class UnsupportedDenoiserError(ConfigurationError):
    """The denoiser cannot be split: names the module in the way and why."""


class ParallelizedError(AsyncDiffError, RuntimeError):
    """The operation is not possible while the denoiser is divided over devices; `Handle.remove()` first."""


class WorkerError(AsyncDiffError, RuntimeError):
    """A stage worker raised, died or stalled.

    `rank`, `stage`, `step` and `operation` say where; `stage` and `step` are None where they do not apply.
    """

    def __init__(
        self,
        message: str,
        *,
        rank: int,
        stage: int | None = None,
        step: int | None = None,
        operation: str | None = None,
    ) -> None:
        super().__init__(message)
        self.rank = rank
        self.stage = stage
        self.step = step
        self.operation = operation


class WeightsLostError(AsyncDiffError, RuntimeError):
    """Weights that only a dead worker held, and that no file gives back."""
