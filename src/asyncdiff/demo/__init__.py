"""The bundled demo pipeline: a tiny Stable Diffusion trained on pictures drawn here, loading offline."""

from pathlib import Path
from typing import TYPE_CHECKING

from asyncdiff.demo.captions import DEMO_CAPTIONS, held_out_captions

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline

__all__ = ["DEMO_CAPTIONS", "DEMO_MODEL", "GUIDANCE_SCALE", "held_out_captions", "load_demo_pipeline"]

# The folder of the bundled pipeline, in diffusers' own format.
DEMO_MODEL: Path = Path(__file__).parent / "assets" / "shapes-unet"

# The guidance scale the bundled pipeline draws best with.
GUIDANCE_SCALE = 4.0


def load_demo_pipeline(torch_dtype: "torch.dtype | None" = None) -> "StableDiffusionPipeline":
    """The bundled pipeline on the CPU, in float32 unless told otherwise, with its progress bar off."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(
        DEMO_MODEL, dtype=torch_dtype or torch.float32, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
