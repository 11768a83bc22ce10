"""Import path of the published code for image and video pipelines with a U-Net (Stable Diffusion, SDXL, SVD): `from asyncdiff.async_sd import AsyncDiff`."""

from asyncdiff.pipeline.compat import AsyncDiff

__all__ = ["AsyncDiff"]
