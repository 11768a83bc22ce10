"""Warnings that point at the user's line."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

_LIBRARIES = ("asyncdiff", "torch", "diffusers", "contextlib", "tqdm")


class AsyncDiffWarning(UserWarning):
    """Something works, but not as well as it could."""


def warn_user(message: str) -> None:
    """Warn at the innermost frame that is in none of the libraries a pipeline call goes through."""
    warnings.warn(f"asyncdiff: {message}", AsyncDiffWarning, stacklevel=_depth_of_user() + 1)


def _depth_of_user() -> int:
    """How many frames above the caller of this function the user's is; 1 where there is none."""
    depth = 0
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _LIBRARIES:
            return depth
        frame, depth = frame.f_back, depth + 1
    return 1
