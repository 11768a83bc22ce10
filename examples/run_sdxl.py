"""Stable Diffusion XL on several devices.

Run it as one of
    python examples/run_sdxl.py --devices cuda:0,cuda:1
    torchrun --nproc-per-node 2 examples/run_sdxl.py
    python examples/run_sdxl.py --tiny --devices cpu,cpu
"""

import common
from diffusers import StableDiffusionXLPipeline

import asyncdiff
from asyncdiff.tiny import tiny_pipeline


def main(options: common.Options) -> None:
    if options.tiny:
        pipe = tiny_pipeline("sdxl")
    else:
        pipe = StableDiffusionXLPipeline.from_pretrained(options.model, dtype=options.dtype, variant="fp16")
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
        model="stabilityai/stable-diffusion-xl-base-1.0",
        output="sdxl.png",
        steps=50,
        prompt="a photo of an astronaut riding a horse on mars",
    )
    common.run(main, __doc__, defaults)
