"""Stable Diffusion XL with a ControlNet for edges on several devices.

Run it as one of
    python examples/run_controlnet_sdxl.py --devices cuda:0,cuda:1
    torchrun --nproc-per-node 2 examples/run_controlnet_sdxl.py
    python examples/run_controlnet_sdxl.py --tiny --devices cpu,cpu
"""

import common
from diffusers import ControlNetModel, StableDiffusionXLControlNetPipeline

import asyncdiff
from asyncdiff.tiny import tiny_pipeline

PICTURE = (
    "https://huggingface.co/datasets/hf-internal-testing/diffusers-images/resolve/main/sd_controlnet/"
    "hf-logo.png"
)


def main(options: common.Options) -> None:
    if options.tiny:
        pipe = tiny_pipeline("controlnet-sdxl")
    else:
        controlnet = ControlNetModel.from_pretrained(
            "diffusers/controlnet-canny-sdxl-1.0", dtype=options.dtype
        )
        pipe = StableDiffusionXLControlNetPipeline.from_pretrained(
            options.model, controlnet=controlnet, dtype=options.dtype, variant="fp16"
        )
    pipe.to(options.device)

    asyncdiff.parallelize(pipe, **options.parallel)  # the one added line

    image = pipe(
        options.prompt,
        image=common.edges(options.load_picture(PICTURE)),
        controlnet_conditioning_scale=0.5,
        num_inference_steps=options.steps,
        generator=options.generator(),
    ).images[0]
    image.save(options.output)


if __name__ == "__main__":
    defaults = common.Defaults(
        model="stabilityai/stable-diffusion-xl-base-1.0",
        output="controlnet_sdxl.png",
        steps=50,
        prompt="aerial view, a futuristic research complex in a bright foggy jungle, hard lighting",
        takes_image=True,
        size=(1024, 1024),
    )
    common.run(main, __doc__, defaults)
