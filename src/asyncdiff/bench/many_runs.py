"""Memory of every process after 2, 10 and 100 images: a divided pipeline must not grow.

python -m asyncdiff.bench.many_runs --json many-runs.json
"""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from asyncdiff.bench import command
from asyncdiff.bench.process_memory import memory_now
from asyncdiff.errors import ConfigurationError

DEFAULT_COUNTS = (2, 10, 100)
VARIATIONS = ("nothing", "size", "size-and-batch")
"""What differs from image to image besides the seed; structures of inputs that come back must be known."""

_MB = 1e6


@dataclass(frozen=True)
class Held:
    """After `images` images. `private_bytes`: of each process, what only it holds in main memory.

    `device_bytes`: used of each CUDA device, by whomever; empty without one.
    """

    images: int
    private_bytes: tuple[int, ...]
    device_bytes: tuple[int, ...]


@dataclass(frozen=True)
class ManyRuns:
    """One pipeline and one way of varying its calls."""

    pipeline: str
    vary: str
    held: tuple[Held, ...]

    @property
    def bytes_per_image(self) -> tuple[float, ...]:
        """What each process grew by per image, from the second look to the last."""
        before, after = self.held[-2:]
        images = after.images - before.images
        return tuple(
            (late - early) / images
            for early, late in zip(before.private_bytes, after.private_bytes, strict=True)
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"bytes_per_image": self.bytes_per_image}

    def rows(self) -> list[list[str]]:
        """For the table."""
        title = f"{self.pipeline}, varying {self.vary}"
        rows = [
            [
                f"{title}, {held.images} images",
                _list(held.private_bytes, _MB),
                _list(held.device_bytes, _MB) or "-",
            ]
            for held in self.held
        ]
        return [*rows, [f"{title}, kB per image at the end", _list(self.bytes_per_image, 1e3), "-"]]


def run_many(
    pipeline: str,
    vary: str,
    *,
    devices: Sequence[str],
    counts: Sequence[int] = DEFAULT_COUNTS,
    steps: int = 4,
) -> ManyRuns:
    """Make images with a tiny pipeline on `devices`, and look at the processes after each of `counts`."""
    import warnings

    from asyncdiff.pipeline import parallelize
    from asyncdiff.pipeline.user_warning import AsyncDiffWarning
    from asyncdiff.tiny import TINY_PIPELINES, TinyCall, generate, tiny_pipeline

    pipe = tiny_pipeline(pipeline)
    pipe.to(devices[0])
    pipe.set_progress_bar_config(disable=True)
    held = []
    with warnings.catch_warnings(), parallelize(pipe, list(devices)) as handle:
        warnings.simplefilter("ignore", AsyncDiffWarning)  # of runs too short to gain from this
        pids = [None, *(worker.pid for worker in handle.workers)]
        for image in range(counts[-1]):
            large = vary != "nothing" and image % 2 == 1
            batch = 2 if vary == "size-and-batch" and image % 4 >= 2 else 1
            generate(TINY_PIPELINES[pipeline], pipe, TinyCall(steps, image, batch, large))
            if image + 1 in counts:
                gc.collect()
                held.append(Held(image + 1, tuple(map(_private_bytes, pids)), tuple(_used(devices))))
    return ManyRuns(pipeline, vary, tuple(held))


def _private_bytes(pid: int | None) -> int:
    """None: of this process."""
    return memory_now(os.getpid() if pid is None else pid).private


def _used(devices: Sequence[str]) -> list[int]:
    import torch

    used = []
    for device in dict.fromkeys(devices):
        if torch.device(device).type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            used.append(total - free)
    return used


def many_runs(
    pipeline: Annotated[
        list[str] | None, typer.Option(help="Tiny pipelines; by default sd15 and sd3.")
    ] = None,
    vary: Annotated[
        list[str] | None, typer.Option(help=f"Any of {', '.join(VARIATIONS)}; default all.")
    ] = None,
    images: Annotated[
        list[int] | None, typer.Option(help=f"Look after so many; by default {DEFAULT_COUNTS}.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Of each image.")] = 4,
    devices: command.DevicesOption = "cpu,cpu",
    json_file: command.JsonOption = None,
) -> None:
    """Memory of every process after 2, 10 and 100 images."""
    counts = sorted(set(images or DEFAULT_COUNTS))
    command.check_at_least("--images", counts[0], 1)
    if len(counts) < 2:
        raise ConfigurationError("--images: needs two or more different numbers, to compare.")
    command.check_at_least("--steps", steps, 1)
    for name in vary or ():
        if name not in VARIATIONS:
            raise ConfigurationError(f"--vary {name}: must be one of {', '.join(VARIATIONS)}.")
    results = [
        run_many(name, how, devices=devices.split(","), counts=counts, steps=steps)
        for name in pipeline or ("sd15", "sd3")
        for how in vary or VARIATIONS
    ]
    command.show_table(
        f"private memory after so many images, {devices}",
        ["", "MB of each process", "MB used of each device"],
        [row for result in results for row in result.rows()],
    )
    measured = {"devices": devices.split(","), "steps": steps, "results": [r.to_json() for r in results]}
    command.finish("many_runs", measured, json_file)


def _list(values: Sequence[float], unit: float) -> str:
    return " / ".join(f"{value / unit:.1f}" for value in values)


if __name__ == "__main__":
    command.run_command(many_runs)
