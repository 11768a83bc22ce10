"""The measures are what their formulas say, computed here once more without the libraries behind them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import correlate1d
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from asyncdiff.bench.quality.metrics import Judges, ms_ssim, ms_ssim_scales, ssim
from asyncdiff.bench.quality.recording import recorded_steps, relative_errors
from asyncdiff.bench.quality.results import Judgement, mean_psnr_db, worst_tenth
from asyncdiff.bench.quality.weights import LocalWeights
from asyncdiff.demo import held_out_captions
from asyncdiff.demo.captions import scene_of
from asyncdiff.demo.drawing import draw
from asyncdiff.demo.vocabulary import build_tokenizer
from asyncdiff.errors import ConfigurationError

_BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def pictures(count: int, size: int, seed: int) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    # Coarse squares and some noise: at random pixels, SSIM would be nothing but noise itself.
    coarse = rng.integers(0, 220, (count, size // 8, size // 8, 3)).repeat(8, 1).repeat(8, 2)
    values = (coarse + rng.integers(0, 30, coarse.shape)).astype(np.uint8)
    return [Image.fromarray(each) for each in values]


def disturbed(originals: list[Image.Image], strength: int, seed: int) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    found = []
    for original in originals:
        values = np.asarray(original, dtype=int)
        noise = rng.integers(-strength, strength + 1, values.shape)
        found.append(Image.fromarray(np.clip(values + noise, 0, 255).astype(np.uint8)))
    return found


def _similarity(found: np.ndarray, expected: np.ndarray, crop: int) -> tuple[float, float]:
    """SSIM of Wang et al. 2004 and its contrast part, mean over channels and places (the latter without a
    border of `crop`), for values of 0 to 1, Gaussian window of 11 pixels with a deviation of 1.5."""
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    window /= window.sum()

    def blur(values: np.ndarray) -> np.ndarray:
        return correlate1d(correlate1d(values, window, 0, mode="mirror"), window, 1, mode="mirror")

    mean_x, mean_y = blur(found), blur(expected)
    var_x = blur(found**2) - mean_x**2
    var_y = blur(expected**2) - mean_y**2
    covariance = blur(found * expected) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    contrast = (2 * covariance + c2) / (var_x + var_y + c2)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    inner = contrast[crop:-crop, crop:-crop] if crop else contrast
    return float((luminance * contrast).mean()), float(inner.mean())


def _values(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture, dtype=np.float64) / 255


@pytest.mark.parametrize("strength", [3, 40])
def test_ssim_is_the_formula(strength: int) -> None:
    originals = pictures(3, 64, 0)
    others = disturbed(originals, strength, 1)
    expected = [_similarity(_values(a), _values(b), 0)[0] for a, b in zip(others, originals, strict=True)]
    assert ssim(others, originals) == pytest.approx(expected, abs=4e-4)


@pytest.mark.parametrize(("size", "scales"), [(64, 3), (176, 5)])
def test_ms_ssim_is_the_formula_on_as_many_scales_as_fit(size: int, scales: int) -> None:
    assert ms_ssim_scales(size, size) == scales
    originals = pictures(2, size, 2)
    others = disturbed(originals, 60, 3)
    expected = []
    for pair in zip(others, originals, strict=True):
        found, reference = map(_values, pair)
        product, exponents = 1.0, np.array(_BETAS[:scales]) / sum(_BETAS[:scales])
        for scale, exponent in enumerate(exponents):
            whole, contrast = _similarity(found, reference, 5)
            product *= (whole if scale == scales - 1 else contrast) ** exponent
            half = len(found) // 2
            found, reference = (
                each[: half * 2, : half * 2].reshape(half, 2, half, 2, 3).mean((1, 3))
                for each in (found, reference)
            )
        expected.append(product)
    assert ms_ssim(others, originals, scales) == pytest.approx(
        expected, abs=1e-6
    )  # its exponents are float32


def test_equal_pictures_are_similar_to_the_last_digit() -> None:
    originals = pictures(2, 64, 4)
    assert ssim(originals, originals) == pytest.approx([1.0, 1.0], abs=1e-5)
    assert ms_ssim(originals, originals, 3) == pytest.approx([1.0, 1.0], abs=1e-6)


@pytest.mark.parametrize(
    ("size", "scales"), [((8, 8), 0), ((64, 16), 1), ((512, 32), 2), ((64, 64), 3), ((176, 200), 5)]
)
def test_small_pictures_have_fewer_scales(size: tuple[int, int], scales: int) -> None:
    assert ms_ssim_scales(*size) == scales
    if scales:
        originals = [Image.fromarray(np.zeros((size[1], size[0], 3), np.uint8) + 7)]
        assert ms_ssim(originals, originals, scales) == pytest.approx([1.0])


def test_relative_error_is_per_picture() -> None:
    expected = torch.tensor([[[3.0, 4.0]], [[0.0, 2.0]], [[0.0, 0.0]]])
    found = expected + torch.tensor([[[0.0, 0.5]], [[1.0, 0.0]], [[0.0, 0.0]]])
    assert relative_errors(found, expected) == pytest.approx([0.1, 0.5, 0.0])


def test_worst_tenth_is_rounded_up_and_infinite_values_do_not_hide_others() -> None:
    values = [40.0 - number for number in range(11)]
    assert worst_tenth(values) == [30.0, 31.0]
    assert worst_tenth([5.0]) == [5.0]
    assert mean_psnr_db([30.0, float("inf"), 40.0]) == 35.0
    assert mean_psnr_db([float("inf")] * 2) == float("inf")


class _Scheduler:
    def __init__(self) -> None:
        self.seen: list[float] = []

    def step(self, model_output: torch.Tensor, timestep: int, eta: float = 0.0) -> tuple[torch.Tensor]:
        self.seen.append(eta)
        return (model_output + timestep,)


def test_recording_copies_what_a_buffer_held_and_goes_away() -> None:
    import inspect

    scheduler = _Scheduler()
    before = inspect.signature(scheduler.step)
    buffer = torch.zeros(2)
    with recorded_steps(scheduler) as steps:
        assert inspect.signature(scheduler.step) == before
        for value in (1.0, 2.0):
            buffer.fill_(value)
            scheduler.step(buffer, 10, eta=value)
        scheduler.step(model_output=buffer, timestep=20)
    assert [each.tolist() for each in steps.predictions] == [[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]]
    assert steps.latents is not None
    assert steps.latents.tolist() == [22.0, 22.0]
    assert scheduler.seen == [1.0, 2.0, 0.0]
    assert "step" not in vars(scheduler)


def test_nothing_is_judged_without_weights() -> None:
    judges = Judges(LocalWeights())
    judges.see(pictures(1, 64, 0), ["a caption"])
    assert judges.judge() == Judgement(None, None)


def _save_tiny_clip(folder: Path) -> tuple[CLIPModel, CLIPProcessor]:
    """CLIP with random weights, saved as the published one is."""
    tokenizer = build_tokenizer()
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {
        "image_size": 32, "patch_size": 8, "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    for embedding in (model.text_model.embeddings.token_embedding, model.vision_model.embeddings):
        for parameter in embedding.parameters():
            torch.nn.init.normal_(parameter)  # so that words and pictures matter
    prepare = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = CLIPProcessor(image_processor=prepare, tokenizer=tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def test_clip_score_is_the_cosine_of_picture_and_caption(tmp_path: Path) -> None:
    model, processor = _save_tiny_clip(tmp_path)
    captions = held_out_captions(4)
    drawn = [draw(scene_of(caption)) for caption in captions]
    with torch.no_grad():
        seen = processor(images=drawn, return_tensors="pt")["pixel_values"]
        read = processor(text=captions, padding=True, return_tensors="pt")
        images = model.visual_projection(model.vision_model(seen).pooler_output)
        texts = model.text_projection(
            model.text_model(read["input_ids"], read["attention_mask"]).pooler_output
        )
    scores = 100 * torch.nn.functional.cosine_similarity(images, texts)
    assert scores.std() > 1  # else any order of captions would do
    judges = Judges(LocalWeights(clip=tmp_path))
    for _ in range(2):  # what was judged is forgotten
        judges.see(drawn[:3], captions[:3])
        judges.see(drawn[3:], captions[3:])
        assert judges.judge().clip_score == pytest.approx(max(0.0, scores.mean().item()), abs=1e-3)


@pytest.mark.parametrize("part", ["config.json", "tokenizer*", "processor_config.json"])
def test_clip_without_one_of_its_parts_is_refused(part: str, tmp_path: Path) -> None:
    # transformers makes an empty tokenizer where there is none, which reads nothing of a caption.
    _save_tiny_clip(tmp_path)
    LocalWeights(clip=tmp_path).check(1)
    for path in tmp_path.glob(part):
        path.unlink()
    with pytest.raises(ConfigurationError, match=r"--clip-score-weights .*: must be a folder with"):
        LocalWeights(clip=tmp_path).check(1)


def test_clip_of_something_else_is_refused(tmp_path: Path) -> None:
    _save_tiny_clip(tmp_path)
    (tmp_path / "model.safetensors").write_text("nothing")
    with pytest.raises(ConfigurationError, match=r"--clip-score-weights .*: cannot be loaded"):
        Judges(LocalWeights(clip=tmp_path))
