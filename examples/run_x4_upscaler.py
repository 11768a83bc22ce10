"""The x4 upscaler of Stable Diffusion on several devices.

Run it as one of
    python examples/run_x4_upscaler.py --devices cuda:0,cuda:1
    torchrun --nproc-per-node 2 examples/run_x4_upscaler.py
    python examples/run_x4_upscaler.py --tiny --devices cpu,cpu
"""

import common
from diffusers import StableDiffusionUpscalePipeline

import asyncdiff
from asyncdiff.tiny import tiny_pipeline

PICTURE = (
    "https://huggingface.co/datasets/hf-internal-testing/diffusers-images/resolve/main/sd2-upscale/"
    "low_res_cat.png"
)


def main(options: common.Options) -> None:
    if options.tiny:
        pipe = tiny_pipeline("x4-upscaler")
    else:
        pipe = StableDiffusionUpscalePipeline.from_pretrained(options.model, dtype=options.dtype)
    pipe.to(options.device)

    asyncdiff.parallelize(pipe, **options.parallel)  # the one added line

    image = pipe(
        options.prompt,
        image=options.load_picture(PICTURE),  # of --width and --height; the result is four times as large
        num_inference_steps=options.steps,
        generator=options.generator(),
    ).images[0]
    image.save(options.output)


if __name__ == "__main__":
    defaults = common.Defaults(
        model="stabilityai/stable-diffusion-x4-upscaler",
        output="x4_upscaler.png",
        steps=75,
        prompt="a white cat",
        takes_image=True,
        size=(128, 128),
    )
    common.run(main, __doc__, defaults)
