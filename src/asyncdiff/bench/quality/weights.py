"""Weights of the networks that some measures need: named by whoever measures, never downloaded. Standard
library only."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from asyncdiff.errors import ConfigurationError

LEAST_FID_IMAGES = 1000
"""The features of FID have 2048 dimensions: from fewer pictures their covariance says little."""

_CLIP_FILES = (
    ("config.json",),
    ("tokenizer.json", "vocab.json"),
    ("preprocessor_config.json", "processor_config.json"),
)
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class LocalWeights:
    """`lpips`: torchvision's AlexNet, a .pth file. `clip`: a folder as transformers saves CLIPModel and
    CLIPProcessor. `fid`: torch-fidelity's Inception, a .pth file; `fid_images`: a folder of real pictures."""

    lpips: Path | None = None
    clip: Path | None = None
    fid: Path | None = None
    fid_images: Path | None = None

    def check(self, num_captions: int) -> None:
        """`ConfigurationError` naming the option for what is not there, or too little of it."""
        _check_file("--lpips-weights", self.lpips)
        _check_file("--fid-weights", self.fid)
        _check_clip(self.clip)
        self._check_fid(num_captions)
        if self.lpips is not None:
            _check_installed("--lpips-weights", "torchvision")
        if self.fid is not None:
            _check_installed("--fid-weights", "torch_fidelity")

    def _check_fid(self, num_captions: int) -> None:
        if (self.fid is None) != (self.fid_images is None):
            raise ConfigurationError("--fid-weights and --fid-images belong together: give both or neither.")
        if self.fid_images is None:
            return
        if not self.fid_images.is_dir():
            raise ConfigurationError(f"--fid-images {self.fid_images}: is no folder.")
        count = sum(1 for _ in self.fid_image_files())
        if count < LEAST_FID_IMAGES:
            raise ConfigurationError(
                f"--fid-images {self.fid_images}: has {count} pictures, but FID needs {LEAST_FID_IMAGES} or "
                "more."
            )
        if num_captions < LEAST_FID_IMAGES:
            raise ConfigurationError(
                f"--num-captions {num_captions}: FID needs {LEAST_FID_IMAGES} generated pictures or more, as "
                "many as real ones. Generate more, or leave --fid-weights out."
            )

    def fid_image_files(self) -> Iterator[Path]:
        """The pictures of the folder, by name."""
        assert self.fid_images is not None
        return (path for path in sorted(self.fid_images.iterdir()) if path.suffix.lower() in _IMAGE_SUFFIXES)

    @property
    def lpips_missing(self) -> str:
        """Why there is no LPIPS; empty where there is."""
        if self.lpips is not None:
            return ""
        if importlib.util.find_spec("torchvision") is None:
            return "no torchvision"
        return "no --lpips-weights"


def _check_file(option: str, path: Path | None) -> None:
    if path is not None and not path.is_file():
        raise ConfigurationError(
            f"{option} {path}: is no file. Nothing is downloaded: name one that is here."
        )


def _check_clip(folder: Path | None) -> None:
    """Every part: where one is missing, transformers makes one that knows nothing."""
    if folder is None:
        return
    for names in _CLIP_FILES:
        if not any((folder / name).is_file() for name in names):
            raise ConfigurationError(
                f"--clip-score-weights {folder}: must be a folder with {' or '.join(names)}, as CLIPModel "
                "and CLIPProcessor save themselves."
            )


def _check_installed(option: str, module: str) -> None:
    if importlib.util.find_spec(module) is None:
        package = module.replace("_", "-")
        raise ConfigurationError(f"{option} needs {package}: pip install {package}.")
