"""Fills the table of docs/pipelines.md: where real denoisers would be cut, found on fake tensors in seconds
each, without their weights.

python -m asyncdiff.bench.pipelines_table docs/pipelines.md
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from asyncdiff.bench.architectures import ARCHITECTURES, Architecture, build_denoiser
from asyncdiff.bench.readme import replace_measured
from asyncdiff.pipeline.examination import Examination, examine
from asyncdiff.tiny import TINY_PIPELINES
from asyncdiff.trace import flatten_inputs

NUM_STAGES = (2, 4)
_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Cut:
    """A denoiser in `num_stages` stages, balanced by FLOPs. `imbalance`: of the largest stage's FLOPs over an
    even share; the bytes are per step, and of the weights of each device.
    """

    num_stages: int
    kind: str
    num_blocks: int
    crossing_bytes: float
    parameter_bytes: tuple[int, ...]
    imbalance: float


@dataclass(frozen=True)
class Row:
    """One architecture. `flops`: of one denoiser call."""

    architecture: Architecture
    parameter_bytes: int
    flops: float
    cuts: tuple[Cut, ...]

    @property
    def largest_imbalance(self) -> float:
        return max(cut.imbalance for cut in self.cuts)


def examine_real_size(architecture: Architecture) -> Examination:
    """Its denoiser, called once on fake tensors with inputs of the usual size."""
    denoiser = build_denoiser(architecture, _DTYPE, weightless=True)
    inputs = flatten_inputs(type(denoiser).forward, (), architecture.inputs(_DTYPE))
    return examine(denoiser, inputs, weights_at_hand=False)


def cut_real_size(architecture: Architecture, num_stages: Iterable[int] = NUM_STAGES) -> Row:
    """What `parallelize` chooses by default, with costs in FLOPs."""
    examination = examine_real_size(architecture)
    cuts = tuple(_cut(examination, number) for number in num_stages)
    flops, _ = examination.recording.work[0]
    return Row(architecture, examination.parameter_bytes, flops, cuts)


def _cut(examination: Examination, num_stages: int) -> Cut:
    devices = [f"cuda:{index}" for index in range(num_stages)]
    plan = examination.plan(num_stages, devices, by_flops=True)
    assert plan.predictions is not None
    return Cut(
        num_stages=num_stages,
        kind=plan.kind,
        num_blocks=sum(map(len, plan.stages)),
        crossing_bytes=plan.predictions.crossing_bytes_per_step,
        parameter_bytes=plan.predictions.parameter_bytes,
        imbalance=examination.flops_imbalance(plan),
    )


def table(rows: Sequence[Row], conformance: Sequence[str]) -> str:
    """In Markdown. `conformance`: the families that the conformance suite runs."""
    heads = ["pipeline", "denoiser", "size", "GB", "TFLOP per call", "blocks, N = 2 / 4"]
    for number in NUM_STAGES:
        heads += [f"MB crossing, N = {number}", f"GB per device, N = {number}"]
    heads += ["largest imbalance", "conformance suite"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    lines += ["| " + " | ".join(_cells(row, conformance)) + " |" for row in rows]
    return "\n".join([*lines, "", _closing(rows, conformance)])


def _cells(row: Row, conformance: Sequence[str]) -> list[str]:
    architecture = row.architecture
    cells = [
        architecture.title, f"`{architecture.class_name}`",
        f"{architecture.height} x {architecture.width}, batch {architecture.batch}",
        _gigabytes(row.parameter_bytes), f"{row.flops / 1e12:.1f}",
        " / ".join(str(cut.num_blocks) for cut in row.cuts),
    ]  # fmt: skip
    for cut in row.cuts:
        shares = ", ".join(
            f"{_gigabytes(held)} ({held / row.parameter_bytes:.0%})" for held in cut.parameter_bytes
        )
        cells += [f"{cut.crossing_bytes / 1e6:.0f}", shares]
    covered = f"`{architecture.name}`" if architecture.name in conformance else "no"
    return [*cells, f"{row.largest_imbalance:.1%}", covered]


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f}" if num_bytes < 1e10 else f"{num_bytes / 1e9:.1f}"


def _closing(rows: Sequence[Row], conformance: Sequence[str]) -> str:
    shown = {row.architecture.name for row in rows}
    others = [f"`{name}`" for name in conformance if name not in shown]
    more = f" The conformance suite also runs {', '.join(others)}." if others else ""
    return f"Counted with torch {torch.__version__.split('+')[0]} and bfloat16 weights.{more}"


def main() -> None:
    """The command of the module's docstring."""
    parser = argparse.ArgumentParser(description="Fill the table of docs/pipelines.md.")
    parser.add_argument("page", type=Path)
    page: Path = parser.parse_args().page
    rows = []
    for architecture in ARCHITECTURES.values():
        sys.stderr.write(f"{architecture.name} ...\n")
        rows.append(cut_real_size(architecture))
    filled = replace_measured(page.read_text(encoding="utf-8"), table(rows, list(TINY_PIPELINES)))
    page.write_text(filled, encoding="utf-8")


if __name__ == "__main__":
    main()
