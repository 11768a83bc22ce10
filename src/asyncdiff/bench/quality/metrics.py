"""How far two pictures are apart, and how good pictures are by themselves. torchmetrics computes everything
but PSNR."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from asyncdiff.bench.quality.results import Judgement
from asyncdiff.bench.quality.weights import LocalWeights
from asyncdiff.errors import ConfigurationError

_KERNEL = 11  # pixels, of SSIM's window
# Wang, Simoncelli and Bovik 2003: the exponent of each scale, the finest first.
_MS_SSIM_BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def ms_ssim_scales(width: int, height: int) -> int:
    """How many of MS-SSIM's five scales pictures of this size have; each halves them, and its window must
    fit."""
    smallest = min(width, height)
    fitting = (
        count
        for count in range(len(_MS_SSIM_BETAS), 0, -1)
        # The second is torchmetrics' own rule, a little stricter for four and five.
        if smallest >> (count - 1) >= _KERNEL and smallest // max(1, count - 1) ** 2 >= _KERNEL
    )
    return next(fitting, 0)


def ssim(found: Sequence[Image.Image], expected: Sequence[Image.Image]) -> list[float]:
    """SSIM of each pair, with torchmetrics' defaults (Gaussian window of 11 pixels), on values of 0 to 1."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    values: list[float] = structural_similarity_index_measure(
        _unit(found), _unit(expected), data_range=1.0, reduction="none"
    ).tolist()
    return values


def ms_ssim(found: Sequence[Image.Image], expected: Sequence[Image.Image], scales: int) -> list[float]:
    """MS-SSIM of each pair on the `scales` finest of five scales, their exponents scaled to a sum of 1."""
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    kept = _MS_SSIM_BETAS[:scales]
    values: list[float] = multiscale_structural_similarity_index_measure(
        _unit(found),
        _unit(expected),
        data_range=1.0,
        reduction="none",
        betas=tuple(beta / sum(kept) for beta in kept),
    ).tolist()
    return values


class Lpips:
    """LPIPS with AlexNet from a local file; torchmetrics brings the layers on top of it."""

    def __init__(self, weights: Path) -> None:
        self._metric = _lpips_metric(weights)

    def __call__(self, found: Sequence[Image.Image], expected: Sequence[Image.Image]) -> list[float]:
        """Of each pair; 0 is equal."""
        with torch.inference_mode():
            values = self._metric(_unit(found), _unit(expected))
        flat: list[float] = values.reshape(-1).tolist()
        return flat


def _lpips_metric(weights: Path) -> Any:
    """torchmetrics takes no path: torchvision finds the file where it would have put a download."""
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
    from torchvision.models import AlexNet_Weights

    name = AlexNet_Weights.DEFAULT.url.rpartition("/")[2]
    before = torch.hub.get_dir()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "checkpoints").mkdir()
        (Path(folder) / "checkpoints" / name).symlink_to(weights.expanduser().resolve())
        torch.hub.set_dir(folder)
        try:
            metric = LearnedPerceptualImagePatchSimilarity(net_type="alex", reduction="none", normalize=True)
        except (RuntimeError, OSError, UnpicklingError) as error:
            raise ConfigurationError(
                f"--lpips-weights {weights}: is no state dict of torchvision's AlexNet."
            ) from error
        finally:
            torch.hub.set_dir(before)
    return metric


class Judges:
    """CLIP score and FID of pictures by themselves, where weights are at hand."""

    def __init__(self, weights: LocalWeights) -> None:
        self._clip = None if weights.clip is None else _clip_metric(weights.clip)
        self._fid = None if weights.fid is None else _fid_metric(weights.fid, weights.fid_image_files())

    def see(self, pictures: Sequence[Image.Image], captions: Sequence[str]) -> None:
        """Some of the pictures that are to be judged together."""
        tensor = _bytes(pictures)
        with torch.inference_mode():
            if self._clip is not None:
                self._clip.update(tensor, list(captions))
            if self._fid is not None:
                self._fid.update(tensor, real=False)

    def judge(self) -> Judgement:
        """Of all that were seen since the last judgement."""
        found = Judgement(*(None if each is None else each.compute().item() for each in self._metrics))
        for each in self._metrics:
            if each is not None:
                each.reset()
        return found

    @property
    def _metrics(self) -> tuple[Any, Any]:
        return self._clip, self._fid


def _clip_metric(folder: Path) -> Any:
    from safetensors import SafetensorError
    from torchmetrics.multimodal.clip_score import CLIPScore
    from transformers import CLIPModel, CLIPProcessor

    try:
        model = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
        processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigurationError(f"--clip-score-weights {folder}: cannot be loaded ({error}).") from error
    return CLIPScore(model_name_or_path=lambda: (_ClipFeatures(model), processor))


class _ClipFeatures(nn.Module):
    """CLIP as torchmetrics 1.9 calls it: features as tensors, where transformers 5 returns them in an
    output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.config = model.config

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return _features(self.model.get_image_features(pixel_values))  # type: ignore[operator]

    def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return _features(self.model.get_text_features(input_ids, attention_mask))  # type: ignore[operator]


def _features(output: Any) -> torch.Tensor:
    features: torch.Tensor = output if isinstance(output, torch.Tensor) else output.pooler_output
    return features


def _fid_metric(weights: Path, real: Iterable[Path]) -> Any:
    from torchmetrics.image.fid import FrechetInceptionDistance

    try:
        metric = FrechetInceptionDistance(
            feature_extractor_weights_path=str(weights.expanduser()), reset_real_features=False
        )
    except (RuntimeError, OSError, UnpicklingError) as error:
        raise ConfigurationError(
            f"--fid-weights {weights}: is no state dict of torch-fidelity's Inception."
        ) from error
    with torch.inference_mode():
        for path in real:  # of any size: the network scales them
            metric.update(_bytes([Image.open(path)]), real=True)
    return metric


def _unit(pictures: Sequence[Image.Image]) -> torch.Tensor:
    """(pictures, 3, height, width), 0 to 1, float32: on a plain background SSIM is then right to about 0.0004
    (rounding of the variance); in float64 a picture of 1024 pixels took 12 s instead of 0.9."""
    return _bytes(pictures).float() / 255


def _bytes(pictures: Sequence[Image.Image]) -> torch.Tensor:
    """(pictures, 3, height, width), uint8."""
    values = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    return torch.from_numpy(values).permute(0, 3, 1, 2).contiguous()
