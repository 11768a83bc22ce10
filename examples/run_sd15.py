"""Stable Diffusion 1.5 on several devices.

Run it as one of
    python examples/run_sd15.py --devices cuda:0,cuda:1
    torchrun --nproc-per-node 2 examples/run_sd15.py
    python examples/run_sd15.py --tiny --devices cpu,cpu
"""

import common
from diffusers import StableDiffusionPipeline

import asyncdiff
from asyncdiff.tiny import tiny_pipeline


def main(options: common.Options) -> None:
    if options.tiny:
        pipe = tiny_pipeline("sd15")
    else:
        pipe = StableDiffusionPipeline.from_pretrained(options.model, dtype=options.dtype)
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
        model="stable-diffusion-v1-5/stable-diffusion-v1-5",
        output="sd15.png",
        steps=50,
        prompt="a photograph of an astronaut riding a horse on mars",
    )
    common.run(main, __doc__, defaults)
