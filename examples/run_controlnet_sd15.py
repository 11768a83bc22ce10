"""Stable Diffusion 1.5 with a ControlNet for edges on several devices.

Run it as one of
    python examples/run_controlnet_sd15.py --devices cuda:0,cuda:1
    torchrun --nproc-per-node 2 examples/run_controlnet_sd15.py
    python examples/run_controlnet_sd15.py --tiny --devices cpu,cpu
"""

import common
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

import asyncdiff
from asyncdiff.tiny import tiny_pipeline

PICTURE = (
    "https://huggingface.co/datasets/huggingface/documentation-images/resolve/main/diffusers/"
    "input_image_vermeer.png"
)


def main(options: common.Options) -> None:
    if options.tiny:
        pipe = tiny_pipeline("controlnet-sd15")
    else:
        controlnet = ControlNetModel.from_pretrained("lllyasviel/sd-controlnet-canny", dtype=options.dtype)
        pipe = StableDiffusionControlNetPipeline.from_pretrained(
            options.model, controlnet=controlnet, dtype=options.dtype
        )
    pipe.to(options.device)

    asyncdiff.parallelize(pipe, **options.parallel)  # the one added line

    image = pipe(
        options.prompt,
        image=common.edges(options.load_picture(PICTURE)),
        num_inference_steps=options.steps,
        generator=options.generator(),
    ).images[0]
    image.save(options.output)


if __name__ == "__main__":
    defaults = common.Defaults(
        model="stable-diffusion-v1-5/stable-diffusion-v1-5",
        output="controlnet_sd15.png",
        steps=50,
        prompt="a futuristic-looking woman",
        takes_image=True,
        size=(512, 512),
    )
    common.run(main, __doc__, defaults)
