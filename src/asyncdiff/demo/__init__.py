"""The bundled demo pipelines, trained on pictures drawn here and loaded offline: Stable Diffusion, tiny."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asyncdiff.demo.captions import DEMO_CAPTIONS, held_out_captions

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

__all__ = [
    "DEMO_CAPTIONS",
    "DEMO_MODEL",
    "DEMO_MODELS",
    "GUIDANCE_SCALE",
    "DemoModel",
    "held_out_captions",
    "load_demo_pipeline",
]

_ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class DemoModel:
    """A bundled pipeline, and how it is meant to be loaded and called.

    `name` is its name on command lines and that of its denoiser in the pipeline. `folder` holds it in
    diffusers' own format. It draws best with `guidance_scale`. `call_arguments` go into every call besides,
    `load_arguments` into `from_pretrained`.
    """

    name: str
    folder: Path
    guidance_scale: float
    call_arguments: Mapping[str, Any] = field(default_factory=dict)
    load_arguments: Mapping[str, Any] = field(default_factory=dict)


DEMO_MODELS: dict[str, DemoModel] = {
    model.name: model
    for model in (
        # StableDiffusionPipeline: a U-Net, v-prediction, DDIM.
        DemoModel("unet", _ASSETS / "shapes-unet", guidance_scale=4.0),
        # StableDiffusion3Pipeline: a transformer, flow matching. It has no T5 encoder: diffusers puts
        # `max_sequence_length` zeros in its place, and one was trained with; and a folder without one is
        # loaded only by saying so. Of the guidance scales 1, 1.5, 2, 2.5, 3, 4 and 6, pictures of 48 held-out
        # captions were nearest to the exact drawings at 1.5 and 2 (root mean square 10.4 of 255; 12.0 at 4).
        DemoModel(
            "transformer",
            _ASSETS / "shapes-transformer",
            guidance_scale=2.0,
            call_arguments={"max_sequence_length": 1},
            load_arguments={"text_encoder_3": None, "tokenizer_3": None},
        ),
    )
}

# Folder and guidance scale of the first one, which is the default everywhere.
DEMO_MODEL: Path = DEMO_MODELS["unet"].folder
GUIDANCE_SCALE = DEMO_MODELS["unet"].guidance_scale


def load_demo_pipeline(torch_dtype: "torch.dtype | None" = None, model: str = "unet") -> "DiffusionPipeline":
    """A bundled pipeline on the CPU, in float32 unless told otherwise, with its progress bar off.

    `model` is one of `DEMO_MODELS`; raises `KeyError` for any other.
    """
    import torch
    from diffusers import DiffusionPipeline

    chosen = DEMO_MODELS[model]
    pipe = DiffusionPipeline.from_pretrained(
        chosen.folder, dtype=torch_dtype or torch.float32, local_files_only=True, **chosen.load_arguments
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
