"""Whether a model can be divided, and where: `asyncdiff doctor --model`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from asyncdiff.bench.loading import load_pipeline
from asyncdiff.bench.progress import Progress
from asyncdiff.cli.failures import one_line
from asyncdiff.errors import AsyncDiffError, ConfigurationError, UnsupportedDenoiserError
from asyncdiff.pipeline.all_denoisers import examine_denoisers
from asyncdiff.pipeline.denoiser import denoisers_of
from asyncdiff.pipeline.examination import Examination
from asyncdiff.pipeline.weightless import load_without_weights
from asyncdiff.planner import Plan


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
class DenoiserVerdict:
    """`name`: what the pipeline calls it. `why_not` names the module in the way, where there is one; the
    figures are then missing. `dtype`: of the weights and of what crosses.
    """

    name: str
    class_name: str
    can_be_divided: bool
    why_not: str
    dtype: str
    kind: str = ""
    stages: tuple[StageShare, ...] = ()
    balance: float = 0.0
    crossing_bytes_per_step: float = 0.0

    def rows(self) -> list[tuple[str, str, str]]:
        """For people."""
        rows = [
            ("denoiser", f"{self.name} ({self.class_name})", self.dtype),
            ("can be divided", "yes" if self.can_be_divided else "no", self.why_not),
        ]
        if not self.can_be_divided:
            return rows
        blocks = sum(stage.num_blocks for stage in self.stages)
        rows.append(("blocks", str(blocks), f"in {len(self.stages)} stages, {self.kind}"))
        rows += [(f"device {i}", *_stage_row(stage)) for i, stage in enumerate(self.stages)]
        rows.append(("largest stage", f"{self.balance:.3f}", "x an even share of the estimated time"))
        crossing = f"{self.crossing_bytes_per_step / 1e6:.2f} MB"
        return [*rows, ("traffic", crossing, "between the devices, per call")]


@dataclass(frozen=True)
class Verdict:
    """Of a pipeline: `denoisers`, of which all must be divided. `why_not`: where it has none.

    `from_configs`: no weights were loaded.
    """

    can_be_divided: bool
    why_not: str
    pipeline: str
    from_configs: bool
    num_stages: int
    denoisers: tuple[DenoiserVerdict, ...]

    def rows(self) -> list[tuple[str, str, str]]:
        """For people."""
        seen = "from its configs" if self.from_configs else "with its weights"
        rows = [("pipeline", self.pipeline, seen)]
        if not self.denoisers:
            rows += [("denoiser", "none", ""), ("can be divided", "no", self.why_not)]
        return [*rows, *(row for denoiser in self.denoisers for row in denoiser.rows())]


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
        examinations = examine_denoisers(pipe, weights_at_hand=False)
    except Exception as error:  # noqa: BLE001  configs may not be enough for many reasons; the weights decide
        return _check_loaded(model, num_stages, devices, dtype, error, report)
    errors = [found for found in examinations.values() if isinstance(found, Exception)]
    if errors:
        return _check_loaded(model, num_stages, devices, dtype, errors[0], report)
    return _verdict(pipe, examinations, num_stages, devices, dtype, from_configs=True)


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
        examinations = examine_denoisers(pipe, weights_at_hand=True)
    except ConfigurationError as error:
        return Verdict(False, str(error), type(pipe).__name__, False, num_stages, ())
    return _verdict(pipe, examinations, num_stages, devices, dtype, from_configs=False)


def _verdict(
    pipe: Any,
    examinations: Mapping[str, Examination | Exception],
    num_stages: int,
    devices: list[str],
    dtype: torch.dtype,
    *,
    from_configs: bool,
) -> Verdict:
    classes = {name: type(denoiser).__name__ for name, denoiser in denoisers_of(pipe).items()}
    denoisers = tuple(
        _denoiser_verdict(name, classes[name], found, num_stages, devices, dtype)
        for name, found in examinations.items()
    )
    return Verdict(
        can_be_divided=all(denoiser.can_be_divided for denoiser in denoisers),
        why_not="",
        pipeline=type(pipe).__name__,
        from_configs=from_configs,
        num_stages=num_stages,
        denoisers=denoisers,
    )


def _denoiser_verdict(
    name: str,
    class_name: str,
    found: Examination | Exception,
    num_stages: int,
    devices: list[str],
    dtype: torch.dtype,
) -> DenoiserVerdict:
    def refusal(reason: str, dtype: torch.dtype) -> DenoiserVerdict:
        return DenoiserVerdict(name, class_name, False, reason, _name_of(dtype))

    if isinstance(found, ConfigurationError):
        return refusal(str(found), dtype)
    if isinstance(found, Exception):
        what = f"{type(found).__name__}: {one_line(str(found))}"
        return refusal(f"an example call of the pipeline failed: {what}", dtype)
    try:
        plan = found.plan(num_stages, devices)
    except UnsupportedDenoiserError as error:
        return refusal(str(error), found.dtype)
    predictions = plan.predictions
    assert predictions is not None
    return DenoiserVerdict(
        name=name,
        class_name=class_name,
        can_be_divided=True,
        why_not="",
        dtype=_name_of(found.dtype),
        kind=plan.kind,
        stages=_shares(found, plan),
        balance=predictions.balance,
        crossing_bytes_per_step=predictions.crossing_bytes_per_step,
    )


def _shares(examination: Examination, plan: Plan) -> tuple[StageShare, ...]:
    predictions = plan.predictions
    assert predictions is not None
    segments = plan.partition(graph := examination.graph(plan)).segments(graph)
    return tuple(
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


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _stage_row(stage: StageShare) -> tuple[str, str]:
    size = stage.weight_bytes
    shown = f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
    spans = ", ".join(first if first == last else f"{first} .. {last}" for first, last in stage.blocks)
    return shown, f"{stage.weight_share:.1%} of the weights, {stage.cost:.1%} of the work: {spans}"
