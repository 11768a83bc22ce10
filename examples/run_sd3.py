"""Stable Diffusion 3 medium on several devices.

Run it as one of
    python examples/run_sd3.py --devices cuda:0,cuda:1
    torchrun --nproc-per-node 2 examples/run_sd3.py
    python examples/run_sd3.py --tiny --devices cpu,cpu
"""

import common
from diffusers import StableDiffusion3Pipeline

import asyncdiff
from asyncdiff.tiny import tiny_pipeline


def main(options: common.Options) -> None:
    if options.tiny:
        pipe = tiny_pipeline("sd3")
    else:
        pipe = StableDiffusion3Pipeline.from_pretrained(options.model, dtype=options.dtype)
    pipe.to(options.device)

    asyncdiff.parallelize(pipe, **options.parallel)  # the one added line

    image = pipe(
        options.prompt,
        num_inference_steps=options.steps,
        height=options.height,
        width=options.width,
        generator=options.generator(),
    ).images[0]
    image.save(options.output)


if __name__ == "__main__":
    defaults = common.Defaults(
        model="stabilityai/stable-diffusion-3-medium-diffusers",
        output="sd3.png",
        steps=28,
        prompt="a cat holding a sign that says hello world",
        size_divisor=16,
    )
    common.run(main, __doc__, defaults)
