"""Loading the pipeline that a command names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from asyncdiff.errors import AsyncDiffError

BUNDLED = {"demo": "unet", "demo-transformer": "transformer"}
"""What the bundled models are called on the command line, and in `asyncdiff.demo.DEMO_MODELS`."""


def load_pipeline(model: str | None, dtype: str, device: str) -> Any:
    """The pipeline of a hub id, a folder or one of `BUNDLED` (None: its first) on `device`, or
    `AsyncDiffError`.

    `dtype`: float32, float16, bfloat16, or auto: float16 on accelerators and float32 on CPUs.
    """
    import torch

    kind = device.partition(":")[0]
    torch_dtype = (
        (torch.float32 if kind == "cpu" else torch.float16) if dtype == "auto" else getattr(torch, dtype)
    )
    name = model or next(iter(BUNDLED))
    try:
        if name in BUNDLED:
            from asyncdiff.demo import load_demo_pipeline

            pipe: Any = load_demo_pipeline(torch_dtype=torch_dtype, model=BUNDLED[name])
        else:
            from diffusers import DiffusionPipeline

            pipe = DiffusionPipeline.from_pretrained(str(Path(name).expanduser()), dtype=torch_dtype)
    except (OSError, ValueError) as error:
        raise AsyncDiffError(f"Cannot load --model {model or '(demo)'}: {first_sentence(error)}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe if kind == "cpu" else pipe.to(device)


def first_sentence(error: Exception) -> str:
    """diffusers' and the hub's messages go on for a page, about stack traces that we do not show."""
    sentence = re.split(r"(?<=\.)\s", " ".join(str(error).split()), maxsplit=1)[0]
    return re.sub(r"^Cannot load model \S+: ", "", sentence)
