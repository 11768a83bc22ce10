"""Import path of the published code for Stable Diffusion 3: `from asyncdiff.async_sd3 import AsyncDiff`."""

from asyncdiff.pipeline.compat import AsyncDiff

__all__ = ["AsyncDiff"]
