"""Stable Video Diffusion on several devices.

Run it as one of
    python examples/run_svd.py --devices cuda:0,cuda:1
    torchrun --nproc-per-node 2 examples/run_svd.py
    python examples/run_svd.py --tiny --devices cpu,cpu
"""

import common
from diffusers import StableVideoDiffusionPipeline

import asyncdiff
from asyncdiff.tiny import tiny_pipeline

PICTURE = (
    "https://huggingface.co/datasets/huggingface/documentation-images/resolve/main/diffusers/"
    "svd-docstring-example.jpeg"
)


def main(options: common.Options) -> None:
    if options.tiny:
        pipe = tiny_pipeline("svd")
    else:
        pipe = StableVideoDiffusionPipeline.from_pretrained(
            options.model, dtype=options.dtype, variant="fp16"
        )
    pipe.to(options.device)

    asyncdiff.parallelize(pipe, **options.parallel)  # the one added line

    picture = options.load_picture(PICTURE)
    frames = pipe(
        picture,
        num_inference_steps=options.steps,
        num_frames=options.num_frames,
        height=picture.height,
        width=picture.width,
        decode_chunk_size=8,
        generator=options.generator(),
    ).frames[0]
    common.write_video(frames, options.output, fps=7)


if __name__ == "__main__":
    defaults = common.Defaults(
        model="stabilityai/stable-video-diffusion-img2vid-xt",
        output="svd.mp4",
        steps=25,
        num_frames=25,
        takes_image=True,
        size=(1024, 576),
        size_divisor=64,
    )
    common.run(main, __doc__, defaults)
