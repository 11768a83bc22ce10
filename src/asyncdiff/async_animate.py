"""Import path of the published code for AnimateDiff: `from asyncdiff.async_animate import AsyncDiff`."""

from asyncdiff.pipeline.compat import AsyncDiff

__all__ = ["AsyncDiff"]
