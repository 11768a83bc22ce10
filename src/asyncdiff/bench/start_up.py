"""Peak memory of every process while a pipeline starts and denoises its first steps.

A folder with a denoiser of real size and random weights is written to a temporary place; everything else in
it is tiny. Each way of starting then runs in processes of its own, which are watched from outside.

python -m asyncdiff.bench.start_up --arch sdxl --dtype bfloat16 --json start-up.json
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from asyncdiff.bench import command
from asyncdiff.bench.process_memory import MemoryWatch, ProcessMemory, memory_now
from asyncdiff.errors import AsyncDiffError, ConfigurationError

WAYS = ("from_pretrained", "torchrun", "parallelize")
"""How a pipeline starts: `asyncdiff.from_pretrained` in a script, the same on every rank of torchrun, or
`asyncdiff.parallelize` of a pipeline that diffusers has loaded."""

ALLOWED_BYTES = 1_200_000_000
"""What a process may take beside its weights when it starts with `from_pretrained`: the imports of torch and
diffusers alone take half of it."""


@dataclass(frozen=True)
class StartedProcess:
    """One rank. `weight_bytes`: of the denoiser's weights that it holds once the run has begun. `peak`: the
    most there was until the end of the first run; `after`: what there was then.
    """

    rank: int
    device: str
    weight_bytes: int
    peak: ProcessMemory
    after: ProcessMemory

    @property
    def beside_weights_bytes(self) -> int:
        """Of the resident peak. Weights on a GPU are no part of the process's memory."""
        return self.peak.resident - (self.weight_bytes if self.device == "cpu" else 0)


@dataclass(frozen=True)
class Start:
    """One way of starting."""

    way: str
    processes: tuple[StartedProcess, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        processes = [
            asdict(process) | {"beside_weights_bytes": process.beside_weights_bytes}
            for process in self.processes
        ]
        return {"way": self.way, "processes": processes}

    def rows(self) -> list[list[str]]:
        """For the table: all sizes in GB."""
        return [
            [
                f"{self.way}, rank {process.rank} on {process.device}",
                *(
                    f"{size / 1e9:.2f}"
                    for size in (
                        process.weight_bytes,
                        process.peak.resident,
                        process.beside_weights_bytes,
                        process.peak.private,
                        process.after.resident,
                        process.after.private,
                    )
                ),
            ]
            for process in self.processes
        ]


@dataclass(frozen=True)
class ModelFolder:
    """A pipeline on disk. `absent`: its components that are not there; `denoiser_bytes`: of all weights of
    the denoiser.
    """

    path: Path
    absent: tuple[str, ...]
    denoiser_bytes: int


def write_folder(arch: str, dtype: str, path: Path) -> ModelFolder:
    """The family's tiny pipeline with a denoiser of real size; in this process for a moment."""
    import torch

    from asyncdiff.bench.architectures import architecture_named, build_denoiser
    from asyncdiff.weights import resident_bytes

    architecture = architecture_named(arch)
    _tiny_rest(arch).save_pretrained(path)
    denoiser: Any = build_denoiser(architecture, getattr(torch, dtype))
    for left in (path / architecture.component).glob("*.safetensors"):
        left.unlink()
    denoiser.save_pretrained(path / architecture.component)
    index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
    absent = tuple(name for name, entry in index.items() if entry == [None, None])
    return ModelFolder(path, absent, resident_bytes(denoiser))


def _tiny_rest(arch: str) -> Any:
    from asyncdiff.demo import load_demo_pipeline
    from asyncdiff.tiny import TINY_PIPELINES, tiny_pipeline

    if arch == "demo":
        return load_demo_pipeline()
    if arch not in TINY_PIPELINES:
        raise ConfigurationError(f"--arch {arch}: there is no tiny pipeline of this family to put it in.")
    return tiny_pipeline(arch)


def measure_start(
    way: str, folder: ModelFolder, *, arch: str, dtype: str, size: int, devices: Sequence[str], steps: int
) -> Start:
    """Start, denoise `steps` steps of a `size` x `size` picture, and look at every process.

    `AsyncDiffError` if the started process ends early; what it said is on standard error.
    """
    request = {
        "way": way, "folder": str(folder.path), "absent": folder.absent, "arch": arch, "dtype": dtype,
        "size": size, "devices": list(devices), "steps": steps,
    }  # fmt: skip
    module = ["-m", "asyncdiff.bench.start_up_process", json.dumps(request)]
    if way == "torchrun":
        module = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(len(devices)),
            *module,
        ]
    process = subprocess.Popen(
        [sys.executable, *module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process, MemoryWatch(process.pid) as watch:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise AsyncDiffError(f"The process started with {way} ended with exit code {process.wait()}.")
            watch.sample()
            return Start(way, tuple(_started(json.loads(line), watch)))
        finally:
            process.terminate()  # its workers end with it


def _started(answer: dict[str, Any], watch: MemoryWatch) -> Iterator[StartedProcess]:
    ranks = zip(answer["pids"], answer["devices"], answer["weight_bytes"], strict=True)
    for rank, (pid, device, weights) in enumerate(ranks):
        yield StartedProcess(rank, device, weights, watch.peaks[pid], memory_now(pid))


def start_up(
    arch: Annotated[
        str, typer.Option(help="Denoiser, built with random weights: sd21, sdxl, sd3 ...")
    ] = "sdxl",
    size: Annotated[
        int, typer.Option(metavar="PIXELS", help="Of the picture; small, as activations count too.")
    ] = 64,
    dtype: command.DtypeOption = "bfloat16",
    devices: command.DevicesOption = "cpu,cpu",
    steps: Annotated[int, typer.Option(help="Denoised after starting.")] = 4,
    way: Annotated[list[str] | None, typer.Option(help=f"Any of {', '.join(WAYS)}; by default all.")] = None,
    json_file: command.JsonOption = None,
) -> None:
    """Peak memory of every process while a pipeline of real size starts."""
    command.check_dtype(dtype)
    command.check_at_least("--steps", steps, 1)
    for name in way or ():
        if name not in WAYS:
            raise ConfigurationError(f"--way {name}: must be one of {', '.join(WAYS)}.")
    names = devices.split(",")
    with tempfile.TemporaryDirectory(prefix="asyncdiff-start-up-") as place:
        folder = write_folder(arch, dtype, Path(place))
        starts = [
            measure_start(each, folder, arch=arch, dtype=dtype, size=size, devices=names, steps=steps)
            for each in way or WAYS
        ]
    command.show_table(
        f"{arch}, {dtype}, {folder.denoiser_bytes / 1e9:.2f} GB, {size} px, GB of each process",
        ["", "weights", "peak", "peak beside weights", "peak, private", "after", "after, private"],
        [row for start in starts for row in start.rows()],
    )
    measured = {
        "arch": arch, "dtype": dtype, "size": size, "steps": steps, "denoiser_bytes": folder.denoiser_bytes,
        "allowed_beside_weights_bytes": ALLOWED_BYTES, "starts": [start.to_json() for start in starts],
    }  # fmt: skip
    command.finish("start_up", measured, json_file)


if __name__ == "__main__":
    command.run_command(start_up)
