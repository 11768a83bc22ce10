# ruff: noqa: T201 (what it prints is what the test reads)
"""Denoise with a folder's pipeline, "whole" or "divided", while no process may allocate as much as its
denoiser takes. Run by test_pretrained.py.
"""

import resource
import sys
from pathlib import Path

from diffusers import StableDiffusion3Pipeline
from random_pipelines import generate

import asyncdiff

folder, way = sys.argv[1:]
absent = dict.fromkeys(
    [f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")]
)
whole = sum(path.stat().st_size for path in Path(folder, "transformer").glob("*.safetensors"))
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
limit = 1024 * int(status["VmData"].split()[0]) + int(0.8 * whole)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))  # workers inherit it
if way == "whole":
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, **absent)
else:
    pipe = asyncdiff.from_pretrained(folder, ["cpu", "cpu"], num_stages=2, **absent)
print("finite:", bool(generate(pipe).isfinite().all()))
