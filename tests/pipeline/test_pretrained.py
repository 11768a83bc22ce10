"""The second door: no process holds the whole denoiser, and the pictures are those of the first door."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_script
from random_pipelines import generate, sd3

import asyncdiff
from asyncdiff.demo import DEMO_MODEL
from asyncdiff.errors import ConfigurationError

pytestmark = pytest.mark.filterwarnings("ignore::asyncdiff.pipeline.user_warning.AsyncDiffWarning")

SCRIPTS = Path(__file__).parent / "scripts"


# Its text encoders have not been saved: there are none.
NONE = dict.fromkeys(
    [f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")]
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    sd3().save_pretrained(tmp_path, max_shard_size="20KB")
    return tmp_path


def loaded(folder: Path | str, **options: Any) -> Any:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder, **NONE, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def divided_from(folder: Path | str, devices: list[str] | None = None, **options: Any) -> Any:
    pipe = asyncdiff.from_pretrained(folder, devices, **NONE, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(None, id="float32"),
        pytest.param(torch.bfloat16, id="bfloat16", marks=pytest.mark.wide),
    ],
)
def test_pictures_are_those_of_a_loaded_pipeline(folder: Path, dtype: torch.dtype | None) -> None:
    options = {} if dtype is None else {"dtype": dtype}
    pipe = loaded(folder, **options)
    whole = sum(parameter.nbytes for parameter in pipe.transformer.parameters())
    alone = generate(pipe)
    options["guidance"] = "together"
    with asyncdiff.parallelize(pipe, devices=["cpu", "cpu"], guidance="together") as handle:
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


def test_groups_read_their_own_weights(folder: Path) -> None:
    """Each the whole once. Compared with weights that were never in a file: where diffusers maps a file,
    they lie at addresses that change the last bit of a product with one row."""
    whole = sum(parameter.nbytes for parameter in sd3().transformer.parameters())
    pipe = sd3()
    with asyncdiff.parallelize(pipe, devices=["cpu", "cpu"], guidance="split"):
        expected = generate(pipe)
    divided = divided_from(folder, ["cpu", "cpu"], guidance="split")
    with asyncdiff.handle_of(divided) as handle:
        assert torch.equal(generate(divided), expected)
        assert all(held >= whole for held in handle.last_run.weight_bytes)


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


def test_dtype_of_the_denoiser_alone(folder: Path) -> None:
    pipe = divided_from(folder, num_stages=2, dtype={"transformer": torch.bfloat16})
    assert pipe.transformer.dtype == torch.bfloat16
    assert pipe.vae.dtype == torch.float32


@pytest.fixture
def hub_cache(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder as huggingface_hub would have left it: snapshots of links to blobs."""
    cache, commit = tmp_path_factory.mktemp("hub"), "0123456789abcdef0123456789abcdef01234567"
    repository = cache / "models--someone--tiny-sd3"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "blobs").mkdir()
    for number, path in enumerate(path for path in sorted(folder.rglob("*")) if path.is_file()):
        blob = repository / "blobs" / f"{number:064x}"
        path.rename(blob)
        link = repository / "snapshots" / commit / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return cache


def test_hub_id_from_the_cache_without_a_network(hub_cache: Path) -> None:
    name = "someone/tiny-sd3"
    expected = generate(loaded(name, cache_dir=hub_cache))
    pipe = divided_from(name, num_stages=2, cache_dir=hub_cache, warmup_steps=99)
    assert torch.equal(generate(pipe), expected)
    with pytest.raises(ConfigurationError, match="someone/else is no folder, and cannot be downloaded"):
        asyncdiff.from_pretrained("someone/else", ["cpu", "cpu"], cache_dir=hub_cache)


@pytest.mark.wide
@pytest.mark.timeout(400)
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts mapped memory in this limit")
def test_denoiser_larger_than_any_process_may_be(tmp_path: Path) -> None:
    """The same limit in the driver and in the worker, under which the whole denoiser cannot be loaded."""
    write_large_pipeline(tmp_path)
    script = str(SCRIPTS / "limited_memory.py")
    whole = run_script([script, str(tmp_path), "whole"], timeout_s=180.0)
    assert whole.returncode != 0
    assert "memory" in whole.stderr, whole.stderr
    divided = run_script([script, str(tmp_path), "divided"], timeout_s=180.0)
    assert divided.returncode == 0, divided.stderr
    assert "finite: True" in divided.stdout


def write_large_pipeline(folder: Path) -> None:
    """1.5 GB in float32, nearly all of it in eight equal layers, in files of half a layer."""
    from diffusers import SD3Transformer2DModel

    pipe = sd3()
    torch.manual_seed(0)
    config = dict(pipe.transformer.config) | {
        "num_layers": 8, "num_attention_heads": 16, "attention_head_dim": 72, "caption_projection_dim": 1152,
    }  # fmt: skip
    pipe.transformer = SD3Transformer2DModel.from_config(config)
    pipe.save_pretrained(folder, max_shard_size="100MB")


@pytest.mark.parametrize("way", ["folder", pytest.param("loaded", marks=pytest.mark.wide)])
def test_rank_of_torchrun_holds_its_stage_only(way: str, folder: Path) -> None:
    """From a folder, no rank ever reads more. Of a pipeline that each has loaded, ranks above 0 let go."""
    script = str(SCRIPTS / "ranks_memory.py")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = run_script([*torchrun, script, str(folder), way])
    assert ended.returncode == 0, ended.stderr
    (answer,) = (line for line in ended.stdout.splitlines() if line.startswith("rank 0: "))
    whole, held, read = (int(word) for word in answer.split()[2:5])
    (other,) = (line for line in ended.stdout.splitlines() if line.startswith("rank 1: "))
    _, kept, read_by_other = (int(word) for word in other.split()[2:5])
    assert kept < whole / 20, "what is left of the script's own pipeline"
    assert 0 < held < 0.8 * whole
    if way == "folder":
        assert held <= read < 0.8 * whole
        assert 0 < read_by_other < 0.8 * whole
        assert whole <= read + read_by_other
    else:
        assert read == read_by_other == 0
