"""Inpainting with Stable Diffusion XL: the middle of a picture is painted anew, on several devices.

Run it as one of
    python examples/run_sdxl_inpainting.py --devices cuda:0,cuda:1
    torchrun --nproc-per-node 2 examples/run_sdxl_inpainting.py
    python examples/run_sdxl_inpainting.py --tiny --devices cpu,cpu
"""

import common
from diffusers import StableDiffusionXLInpaintPipeline

import asyncdiff
from asyncdiff.tiny import tiny_pipeline

FOLDER = "https://raw.githubusercontent.com/CompVis/latent-diffusion/main/data/inpainting_examples/"
PICTURE = FOLDER + "overture-creations-5sI6fQgYIuo.png"
MASK = FOLDER + "overture-creations-5sI6fQgYIuo_mask.png"


def main(options: common.Options) -> None:
    if options.tiny:
        pipe = tiny_pipeline("sdxl-inpainting")
    else:
        pipe = StableDiffusionXLInpaintPipeline.from_pretrained(
            options.model, dtype=options.dtype, variant="fp16"
        )
    pipe.to(options.device)

    asyncdiff.parallelize(pipe, **options.parallel)  # the one added line

    image = pipe(
        options.prompt,
        image=options.load_picture(PICTURE),
        mask_image=options.load_mask(MASK),  # white is painted anew
        strength=0.99,
        guidance_scale=8.0,
        num_inference_steps=options.steps,
        height=options.height,
        width=options.width,
        generator=options.generator(),
    ).images[0]
    image.save(options.output)


if __name__ == "__main__":
    defaults = common.Defaults(
        model="diffusers/stable-diffusion-xl-1.0-inpainting-0.1",
        output="sdxl_inpainting.png",
        steps=20,
        prompt="a tiger sitting on a park bench",
        takes_image=True,
        takes_mask=True,
        size=(1024, 1024),
    )
    common.run(main, __doc__, defaults)
