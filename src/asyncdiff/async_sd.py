"""Import path of the published code for U-Net pipelines: `from asyncdiff.async_sd import AsyncDiff`."""

from asyncdiff.pipeline.compat import AsyncDiff

__all__ = ["AsyncDiff"]
