"""Whether a model can be divided, and where: `asyncdiff doctor --model`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from asyncdiff.bench.progress import Progress
from asyncdiff.cli.failures import one_line
from asyncdiff.cli.generate import load_pipeline
from asyncdiff.errors import AsyncDiffError, ConfigurationError, UnsupportedDenoiserError
from asyncdiff.pipeline.denoiser import denoisers_of
from asyncdiff.pipeline.examination import Examination, examine_pipeline
from asyncdiff.pipeline.weightless import load_without_weights


@dataclass(frozen=True)
class StageShare:
    """What one device would hold and do. `blocks`: the first and the last block of each run of them; `cost`:
    its share of the estimated time of a forward.
    """

    blocks: tuple[tuple[str, str], ...]
    num_blocks: int
    weight_bytes: int
    weight_share: float
    cost: float


@dataclass(frozen=True)
class Verdict:
    """`why_not` names the module in the way, where there is one; the figures are then missing.

    `from_configs`: no weights were loaded. `dtype`: of the weights and of what crosses.
    """

    can_be_divided: bool
    why_not: str
    pipeline: str
    denoisers: dict[str, str]
    dtype: str
    from_configs: bool
    num_stages: int
    kind: str = ""
    stages: tuple[StageShare, ...] = ()
    balance: float = 0.0
    crossing_bytes_per_step: float = 0.0

    def rows(self) -> list[tuple[str, str, str]]:
        """For people."""
        names = ", ".join(f"{name} ({kind})" for name, kind in self.denoisers.items())
        seen = "from its configs" if self.from_configs else "with its weights"
        rows = [
            ("pipeline", self.pipeline, seen),
            ("denoiser", names or "none", self.dtype),
            ("can be divided", "yes" if self.can_be_divided else "no", self.why_not),
        ]
        if not self.can_be_divided:
            return rows
        blocks = sum(stage.num_blocks for stage in self.stages)
        rows.append(("blocks", str(blocks), f"in {self.num_stages} stages, {self.kind}"))
        rows += [(f"device {i}", *_stage_row(stage)) for i, stage in enumerate(self.stages)]
        rows.append(("largest stage", f"{self.balance:.3f}", "x an even share of the estimated time"))
        crossing = f"{self.crossing_bytes_per_step / 1e6:.2f} MB"
        return [*rows, ("traffic", crossing, "between the devices, per step")]


def check_model(model: str, num_stages: int, report: Progress) -> Verdict:
    """Look at the configs first, at the loaded model only if they are not enough.

    `AsyncDiffError` if it cannot be loaded.
    """
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if kind == "cuda" else torch.float32
    devices = [f"{kind}:{i}" if kind == "cuda" else kind for i in range(num_stages)]
    report("Making a call without weights", 0, 0)
    try:
        pipe = load_without_weights(str(Path(model).expanduser()), dtype)
        examination = examine_pipeline(pipe, weights_at_hand=False)
    except Exception as error:  # noqa: BLE001  configs may not be enough for many reasons; the weights decide
        return _check_loaded(model, num_stages, devices, dtype, error, report)
    return _verdict(pipe, examination, num_stages, devices, from_configs=True)


def _check_loaded(
    model: str, num_stages: int, devices: list[str], dtype: torch.dtype, why: Exception, report: Progress
) -> Verdict:
    report("Loading the weights, because the configs are not enough", 0, 0)
    name: Literal["float16", "float32"] = "float16" if dtype == torch.float16 else "float32"
    try:
        pipe = load_pipeline(model, name, "cpu")
    except AsyncDiffError as error:
        if isinstance(why, UnsupportedDenoiserError):
            raise AsyncDiffError(
                f"{one_line(str(why))} And its weights could not be loaded: {error}"
            ) from why
        raise
    report("Making a call", 0, 0)
    try:
        examination = examine_pipeline(pipe, weights_at_hand=True)
    except ConfigurationError as error:
        return _refusal(pipe, str(error), dtype, num_stages, from_configs=False)
    except Exception as error:  # noqa: BLE001  whatever a pipeline raises that the example does not suit
        reason = f"an example call of the pipeline failed: {type(error).__name__}: {one_line(str(error))}"
        return _refusal(pipe, reason, dtype, num_stages, from_configs=False)
    return _verdict(pipe, examination, num_stages, devices, from_configs=False)


def _verdict(
    pipe: Any, examination: Examination, num_stages: int, devices: list[str], *, from_configs: bool
) -> Verdict:
    try:
        plan = examination.plan(num_stages, devices)
    except UnsupportedDenoiserError as error:
        return _refusal(pipe, str(error), examination.dtype, num_stages, from_configs=from_configs)
    predictions = plan.predictions
    assert predictions is not None
    segments = plan.partition(graph := examination.graph(plan)).segments(graph)
    stages = tuple(
        StageShare(
            blocks=tuple(
                (str(segment.blocks[0]), str(segment.blocks[-1]))
                for segment in segments
                if segment.stage == stage
            ),
            num_blocks=len(plan.stages[stage]),
            weight_bytes=predictions.parameter_bytes[stage],
            weight_share=predictions.parameter_bytes[stage] / examination.parameter_bytes,
            cost=predictions.stage_seconds[stage] / sum(predictions.stage_seconds),
        )
        for stage in range(plan.num_stages)
    )
    return Verdict(
        can_be_divided=True,
        why_not="",
        pipeline=type(pipe).__name__,
        denoisers=_denoisers(pipe),
        dtype=str(examination.dtype).removeprefix("torch."),
        from_configs=from_configs,
        num_stages=num_stages,
        kind=plan.kind,
        stages=stages,
        balance=predictions.balance,
        crossing_bytes_per_step=predictions.crossing_bytes_per_step,
    )


def _refusal(pipe: Any, reason: str, dtype: torch.dtype, num_stages: int, *, from_configs: bool) -> Verdict:
    return Verdict(
        can_be_divided=False,
        why_not=reason,
        pipeline=type(pipe).__name__,
        denoisers=_denoisers(pipe),
        dtype=str(dtype).removeprefix("torch."),
        from_configs=from_configs,
        num_stages=num_stages,
    )


def _denoisers(pipe: Any) -> dict[str, str]:
    try:
        return {name: type(denoiser).__name__ for name, denoiser in denoisers_of(pipe).items()}
    except ConfigurationError:
        return {}


def _stage_row(stage: StageShare) -> tuple[str, str]:
    size = stage.weight_bytes
    shown = f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
    spans = ", ".join(first if first == last else f"{first} .. {last}" for first, last in stage.blocks)
    return shown, f"{stage.weight_share:.1%} of the weights, {stage.cost:.1%} of the work: {spans}"
