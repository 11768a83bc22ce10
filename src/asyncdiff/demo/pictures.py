"""The training pictures, numbered: number and seed fix scene, jitter and crop, so none need to be stored."""

from collections.abc import Sequence
from random import Random

import numpy
import torch
from PIL import Image

from asyncdiff.demo.captions import POSITIONS, Scene, caption_of, sample_training_scene
from asyncdiff.demo.drawing import PICTURE_SIZE, draw

CROP_SIZE = 32  # pixels, width and height


def picture_batch(seed: int, numbers: Sequence[int]) -> torch.Tensor:
    """Whole pictures as float32 (pictures, 3, 64, 64) in -1..1."""
    return _as_tensor([_picture(seed, number)[1] for number in numbers])


def crop_batch(seed: int, numbers: Sequence[int]) -> torch.Tensor:
    """One crop of each picture around one of its objects, as float32 (pictures, 3, 32, 32) in -1..1.

    A quarter of the work, and four times as much object per pixel: plain background needs little practice.
    """
    return _as_tensor([_crop(seed, number) for number in numbers])


def picture_captions(seed: int, numbers: Sequence[int]) -> list[str]:
    """The captions of the pictures; none is held out."""
    return [caption_of(_picture(seed, number)[0]) for number in numbers]


def _picture(seed: int, number: int) -> tuple[Scene, Image.Image]:
    rng = Random(f"picture {number} of seed {seed}")
    scene = sample_training_scene(rng)
    return scene, draw(scene, rng.getrandbits(32))


def _crop(seed: int, number: int) -> Image.Image:
    scene, picture = _picture(seed, number)
    rng = Random(f"crop {number} of seed {seed}")
    step = (PICTURE_SIZE - CROP_SIZE) // 2  # from one grid cell's crop to the next one's
    left, top = (
        min(PICTURE_SIZE - CROP_SIZE, max(0, step * place + rng.randint(-8, 8)))
        for place in POSITIONS[rng.choice(scene.things).position]
    )
    return picture.crop((left, top, left + CROP_SIZE, top + CROP_SIZE))


def _as_tensor(pictures: list[Image.Image]) -> torch.Tensor:
    values = numpy.stack([numpy.asarray(picture) for picture in pictures])
    return torch.from_numpy(values).permute(0, 3, 1, 2).float().div(127.5).sub(1)
