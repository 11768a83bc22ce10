"""The second door: no process holds the whole denoiser, and the pictures are those of the first door."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from random_pipelines import generate, sd3

import asyncdiff
from asyncdiff.demo import DEMO_MODEL
from asyncdiff.errors import ConfigurationError

pytestmark = pytest.mark.filterwarnings("ignore::asyncdiff.pipeline.user_warning.AsyncDiffWarning")


# Its text encoders have not been saved: there are none.
NONE = dict.fromkeys(
    [f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")]
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    sd3().save_pretrained(tmp_path, max_shard_size="20KB")
    return tmp_path


def loaded(folder: Path, **options: Any) -> Any:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder, **NONE, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def divided_from(folder: Path, devices: list[str] | None = None, **options: Any) -> Any:
    pipe = asyncdiff.from_pretrained(folder, devices, **NONE, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_pictures_are_those_of_a_loaded_pipeline(folder: Path, dtype: torch.dtype | None) -> None:
    options = {} if dtype is None else {"dtype": dtype}
    pipe = loaded(folder, **options)
    whole = sum(parameter.nbytes for parameter in pipe.transformer.parameters())
    alone = generate(pipe)
    with asyncdiff.parallelize(pipe, devices=["cpu", "cpu"]) as handle:
        expected = generate(pipe)
        held_by_each = handle.last_run.weight_bytes
    divided = divided_from(folder, ["cpu", "cpu"], **options)
    with asyncdiff.handle_of(divided) as handle:
        held = sum(p.untyped_storage().nbytes() for p in divided.transformer.parameters() if not p.is_meta)
        assert held < whole / 20, "only a stand-in before the first call"
        assert (str(divided.transformer.device), divided.transformer.dtype) == ("cpu", dtype or torch.float32)
        assert torch.equal(generate(divided), expected)
        assert torch.equal(generate(divided), expected)
        assert handle.last_run.weight_bytes == held_by_each
    assert torch.equal(generate(divided), alone)
    state = pipe.transformer.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in divided.transformer.state_dict().items())


def test_weights_read_from_files_survive_a_dead_worker(folder: Path) -> None:
    alone = generate(loaded(folder))
    pipe = divided_from(folder, ["cpu", "cpu"])
    handle = asyncdiff.handle_of(pipe)
    generate(pipe)
    handle._division.installations[0].executor._workers.kill(1)
    handle.remove()
    assert torch.equal(generate(pipe), alone)


def test_removing_before_the_first_picture_loads_everything(folder: Path) -> None:
    pipe = divided_from(folder, ["cpu", "cpu"])
    asyncdiff.handle_of(pipe).remove()
    assert torch.equal(generate(pipe), generate(loaded(folder)))
    with pytest.raises(asyncdiff.ParallelizedError, match="is not divided over devices"):
        asyncdiff.handle_of(pipe)


def test_all_stages_in_this_process(folder: Path) -> None:
    pipe = divided_from(folder, num_stages=2, warmup_steps=99)
    assert torch.equal(generate(pipe), generate(loaded(folder)))


def test_demo_model_without_shards() -> None:
    pipe = asyncdiff.from_pretrained(DEMO_MODEL, num_stages=2, dtype=torch.bfloat16)
    assert pipe.unet.dtype == torch.bfloat16
    assert asyncdiff.handle_of(pipe).plan is None


def test_what_is_missing_is_said_before_anything_starts(folder: Path, tmp_path: Path) -> None:
    index = next((folder / "transformer").glob("*.index.json"))
    shard = next(path for path in (folder / "transformer").glob("*.safetensors"))
    with pytest.raises(ConfigurationError, match=r"needs 3 devices .* but 2 were given"):
        asyncdiff.from_pretrained(folder, ["cpu", "cpu"], num_stages=3)
    index.write_text(index.read_text().replace(shard.name, "other.safetensors"))
    with pytest.raises(ConfigurationError, match=r"other.safetensors"):
        asyncdiff.from_pretrained(folder, ["cpu", "cpu"])
    index.unlink()
    with pytest.raises(ConfigurationError, match="safetensors files only"):
        asyncdiff.from_pretrained(folder, ["cpu", "cpu"])
    (folder / "model_index.json").unlink()
    with pytest.raises(ConfigurationError, match="no diffusers pipeline"):
        asyncdiff.from_pretrained(folder, ["cpu", "cpu"])
