"""AnimateDiff, video from Stable Diffusion 1.5 and a motion adapter, on several devices.

Run it as one of
    python examples/run_animatediff.py --devices cuda:0,cuda:1
    torchrun --nproc-per-node 2 examples/run_animatediff.py
    python examples/run_animatediff.py --tiny --devices cpu,cpu
"""

import common
from diffusers import AnimateDiffPipeline, DDIMScheduler, MotionAdapter

import asyncdiff
from asyncdiff.tiny import tiny_pipeline


def main(options: common.Options) -> None:
    if options.tiny:
        pipe = tiny_pipeline("animatediff")
    else:
        adapter = MotionAdapter.from_pretrained(
            "guoyww/animatediff-motion-adapter-v1-5-2", dtype=options.dtype
        )
        pipe = AnimateDiffPipeline.from_pretrained(options.model, motion_adapter=adapter, dtype=options.dtype)
        pipe.scheduler = DDIMScheduler.from_pretrained(
            options.model, subfolder="scheduler", beta_schedule="linear", timestep_spacing="linspace",
            clip_sample=False, steps_offset=1,
        )  # fmt: skip
    pipe.to(options.device)

    asyncdiff.parallelize(pipe, **options.parallel)  # the one added line

    frames = pipe(
        options.prompt,
        num_inference_steps=options.steps,
        num_frames=options.num_frames,
        height=options.height,
        width=options.width,
        generator=options.generator(),
    ).frames[0]
    common.write_video(frames, options.output, fps=8)


if __name__ == "__main__":
    defaults = common.Defaults(
        model="emilianJR/epiCRealism",
        output="animatediff.mp4",
        steps=25,
        num_frames=16,
        prompt="a corgi walking in the park",
    )
    common.run(main, __doc__, defaults)
