"""Scripts written for the published code (github.com/czg1225/AsyncDiff) run as they are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from random_pipelines import generate, sd

import asyncdiff
from asyncdiff.errors import ConfigurationError
from asyncdiff.pipeline.user_warning import AsyncDiffWarning

pytestmark = pytest.mark.filterwarnings("ignore::asyncdiff.pipeline.user_warning.AsyncDiffWarning")

# Arguments, order of calls and use of the default process group as in the published examples.
SCRIPT = """
import argparse, sys
import torch
import torch.distributed as dist
sys.path.insert(0, {tests!r})
from asyncdiff.async_sd import AsyncDiff
from random_pipelines import generate, sd

parser = argparse.ArgumentParser()
parser.add_argument("--model_n", type=int, default=2)
parser.add_argument("--stride", type=int, default=1)
parser.add_argument("--warm_up", type=int, default=3)
parser.add_argument("--time_shift", type=bool, default=False)
args = parser.parse_args()

pipeline = sd()
async_diff = AsyncDiff(pipeline, model_n=args.model_n, stride=args.stride, time_shift=args.time_shift)
async_diff.reset_state(warm_up=args.warm_up)
latents = generate(pipeline, steps=9, seed=1)
async_diff.reset_state(warm_up=args.warm_up)
latents = generate(pipeline, steps=9)
print(f"Rank {{dist.get_rank()}} of {{dist.get_world_size()}} is done.")
if dist.get_rank() == 0:
    torch.save(latents, {output!r})
"""


def run_script(tmp_path: Path, *arguments: str, processes: int) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "run_sd.py"
    output = str(tmp_path / "latents.pt")
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), output=output))
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
    ]
    return subprocess.run(
        [*torchrun, str(script), *arguments], capture_output=True, text=True, timeout=100, cwd=tmp_path
    )


def expected_latents(stride: int) -> torch.Tensor:
    pipe = sd()
    paper = {"forecast": "none", "freshness": "paper"}
    with asyncdiff.parallelize(pipe, num_stages=2, stride=stride, warmup_steps=3, **paper):
        generate(pipe, steps=9, seed=1)
        return generate(pipe, steps=9)


def test_published_script_under_torchrun(tmp_path: Path) -> None:
    done = run_script(tmp_path, "--stride=2", processes=3)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["Rank 0 of 3 is done."]
    assert torch.equal(torch.load(tmp_path / "latents.pt"), expected_latents(2))


@pytest.mark.parametrize("rank", [0, 1])
def test_wrong_number_of_processes_is_refused_on_every_rank(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from asyncdiff.async_sd import AsyncDiff

    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ConfigurationError, match=r"model_n=3 with stride=2 needs 4 .* but the world size is 2"
    ):
        AsyncDiff(sd(), model_n=3, stride=2)
    assert not torch.distributed.is_initialized()


@pytest.fixture
def no_default_group() -> None:
    from asyncdiff.launch import default_group

    yield
    default_group._destroy_default_group()


@pytest.mark.usefixtures("no_default_group")
@pytest.mark.parametrize("module", ["async_sd", "async_sd3", "async_animate"])
def test_every_import_path_leads_to_the_class(module: str) -> None:
    async_diff = __import__(f"asyncdiff.{module}", fromlist=["AsyncDiff"]).AsyncDiff
    pipe = sd()
    wrapped = async_diff(pipe, 3, 1, 2, True)
    assert (wrapped.pipeline, wrapped.model_n, wrapped.stride, wrapped.warm_up) == (pipe, 3, 1, 2)
    generate(pipe, steps=8)
    assert wrapped.handle.plan.settings == asyncdiff.config.Settings(3, 1, 2, True, "none", "paper")
    wrapped.handle.remove()


@pytest.mark.usefixtures("no_default_group")
def test_forecast_and_fresh_reads_on_request() -> None:
    from asyncdiff.async_sd import AsyncDiff

    pipe = sd()
    wrapped = AsyncDiff(pipe, model_n=2, forecast="linear", freshness="auto")
    by_class = generate(pipe, steps=8)
    wrapped.handle.remove()
    with asyncdiff.parallelize(pipe, num_stages=2):
        assert torch.equal(generate(pipe, steps=8), by_class)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model_n": 0}, "num_stages must be at least 1"),
        ({"stride": 0}, "stride must be at least 1"),
        ({"warm_up": 0}, "warmup_steps must be at least 1"),
    ],
)
def test_bad_arguments_are_refused_before_any_group_is_made(arguments: dict[str, int], message: str) -> None:
    from asyncdiff.async_sd import AsyncDiff

    with pytest.raises(ConfigurationError, match=message):
        AsyncDiff(sd(), **arguments)
    assert not torch.distributed.is_initialized()


@pytest.mark.usefixtures("no_default_group")
def test_one_process_warns_that_nothing_is_gained() -> None:
    from asyncdiff.async_sd import AsyncDiff

    with pytest.warns(AsyncDiffWarning, match="without torchrun"):
        AsyncDiff(sd(), model_n=2).handle.remove()
    assert torch.distributed.get_rank() == 0
