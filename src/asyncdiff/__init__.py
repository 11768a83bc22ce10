"""One generation of a diffusers pipeline on several devices, by asynchronous denoising.

    handle = asyncdiff.parallelize(pipe, devices=["cuda:0", "cuda:1"])
    image = pipe("a kitten").images[0]

Nothing heavy is imported until one of the names below is used: `import asyncdiff` takes milliseconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from asyncdiff.errors import (
        AsyncDiffError,
        ConfigurationError,
        ParallelizedError,
        UnsupportedDenoiserError,
        WeightsLostError,
        WorkerError,
    )
    from asyncdiff.pipeline import Handle, Plan, RunReport, from_pretrained, handle_of, parallelize, plan
    from asyncdiff.planner import simulate
    from asyncdiff.simulation import Machine

_HOME = {
    "AsyncDiffError": "errors",
    "ConfigurationError": "errors",
    "Handle": "pipeline",
    "Machine": "simulation",
    "ParallelizedError": "errors",
    "Plan": "pipeline",
    "RunReport": "pipeline",
    "UnsupportedDenoiserError": "errors",
    "WeightsLostError": "errors",
    "WorkerError": "errors",
    "from_pretrained": "pipeline",
    "handle_of": "pipeline",
    "parallelize": "pipeline",
    "plan": "pipeline",
    "simulate": "planner",
}

__all__ = [  # noqa: RUF022 (by importance)
    "parallelize",
    "from_pretrained",
    "plan",
    "handle_of",
    "simulate",
    "Machine",
    "Handle",
    "Plan",
    "RunReport",
    "AsyncDiffError",
    "ConfigurationError",
    "ParallelizedError",
    "UnsupportedDenoiserError",
    "WeightsLostError",
    "WorkerError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
