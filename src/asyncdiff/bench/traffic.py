"""What must cross in a step and what each device must hold, at real sizes, for every way to cut that is worth
knowing; found on fake tensors in 2-byte dtypes, without weights.

python -m asyncdiff.bench.traffic --arch sdxl --json traffic.json
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asyncdiff.bench import command
from asyncdiff.errors import ConfigurationError
from asyncdiff.planner import Plan
from asyncdiff.schedule.builder import KINDS

if TYPE_CHECKING:
    from asyncdiff.graph import BlockGraph
    from asyncdiff.pipeline.examination import Examination

DEFAULT_ARCHITECTURES = ("sd15", "sd21", "sdxl", "sd3", "flux", "svd", "animatediff", "wan-2.1")
IMBALANCES = (0.02, 0.05, 0.1)
"""How much more than an even share of the work the largest stage may have, if fewer bytes cross then."""

WEIGHT_TARGETS = {2: 0.53, 4: 0.29}
"""The largest share of the weights that a device should hold, by the number of devices."""

_FINE_SHARE = 0.05
_FLOPS_PER_S = 1e14  # any rate will do: only ratios decide where a cut goes


@dataclass(frozen=True)
class Cut:
    """One partition. `how`: what was asked for. `crossing_bytes`: per step, predictions not included.

    `weight_shares`: of the denoiser's weights, per device. `imbalance`: of the largest stage's FLOPs over an
    even share.
    """

    how: str
    kind: str
    crossing_bytes: float
    weight_shares: tuple[float, ...]
    imbalance: float

    @property
    def largest_weight_share(self) -> float:
        return max(self.weight_shares)


@dataclass(frozen=True)
class Traffic:
    """One architecture on `num_stages` devices. `prediction_bytes`: of one, which a chain sends back in every
    step. `cuts`: the planner's choice first."""

    arch: str
    height: int
    width: int
    batch: int
    num_stages: int
    prediction_bytes: int
    cuts: tuple[Cut, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def rows(self) -> list[list[str]]:
        """For the table."""
        return [
            [
                f"{self.arch} {self.height} x {self.width}, N = {self.num_stages}, {cut.how}",
                cut.kind,
                f"{cut.crossing_bytes / 1e6:.1f}",
                " / ".join(f"{share:.0%}" for share in cut.weight_shares),
                f"{cut.imbalance:.1%}",
            ]
            for cut in self.cuts
        ]


def measure_traffic(
    arch: str, num_stages: int, height: int | None = None, width: int | None = None
) -> Traffic:
    """Every cut of one architecture; size as usual for it unless given, in pixels."""
    from asyncdiff.bench.architectures import ARCHITECTURES, architecture_named
    from asyncdiff.bench.pipelines_table import examine_real_size

    architecture = ARCHITECTURES.get(arch) or architecture_named(arch)
    architecture = replace(
        architecture, height=height or architecture.height, width=width or architecture.width
    )
    examination = examine_real_size(architecture)
    devices = [f"cuda:{index}" for index in range(num_stages)]
    chosen = examination.plan(num_stages, devices, by_flops=True)
    plans = [("the planner's choice", chosen), *_plans(examination, num_stages, devices)]
    assert chosen.predictions is not None
    return Traffic(
        arch,
        architecture.height,
        architecture.width,
        architecture.batch,
        num_stages,
        chosen.predictions.prediction_bytes,
        tuple(_cut(how, plan, examination) for how, plan in plans),
    )


def _plans(examination: Examination, num_stages: int, devices: list[str]) -> Iterator[tuple[str, Plan]]:
    """Each kind as even as possible, with fewer bytes the less even it may be, and within a share of the
    weights."""
    from asyncdiff.config import Settings
    from asyncdiff.planner import make_plan

    graph = _fine_graph(examination)

    def tried(how: str, **limits: Any) -> Iterator[tuple[str, Plan]]:
        for kind in KINDS:
            try:
                plan = make_plan(
                    graph, Settings(num_stages), devices, kind=kind, driver_seconds=0.0, **limits
                )
            except ConfigurationError:
                continue  # too few blocks for this kind, or none within the share
            yield how, plan

    yield from tried("as even as possible")
    for imbalance in IMBALANCES:
        yield from tried(f"fewest bytes within {imbalance:.0%}", imbalance=imbalance)
    if num_stages in WEIGHT_TARGETS:
        target = WEIGHT_TARGETS[num_stages]
        blocks = sum(block.parameter_bytes for block in graph.blocks)
        share = (target * examination.parameter_bytes - graph.glue_parameter_bytes) / blocks
        yield from tried(f"weights within {target:.0%}", max_weight_share=share)
        largest = IMBALANCES[-1]
        how = f"weights within {target:.0%}, fewest bytes within {largest:.0%}"
        yield from tried(how, max_weight_share=share, imbalance=largest)
        how = f"weights within {target:.0%}, fewest bytes however uneven"
        yield from tried(how, max_weight_share=share, imbalance=num_stages - 1.0)


def _fine_graph(examination: Examination) -> BlockGraph:
    """Blocks small enough for a cut anywhere that matters, with FLOPs for seconds."""
    from asyncdiff.trace import call_costs, find_blocks, paths_below

    recording = examination.recording
    seconds = {
        call.key: flops / _FLOPS_PER_S
        for call, (flops, _) in zip(recording.calls, recording.work, strict=True)
    }
    sizes = {name: spec.num_bytes for name, spec in examination.weights.specs.items()}
    paths = paths_below(
        call_costs(recording), sizes, max_share=_FINE_SHARE, seconds=seconds, cost=lambda flops, moved: flops
    )
    return find_blocks(recording, block_paths=paths, seconds=seconds)


def _cut(how: str, plan: Plan, examination: Examination) -> Cut:
    assert plan.predictions is not None
    whole = examination.parameter_bytes
    return Cut(
        how=how,
        kind=plan.kind,
        crossing_bytes=plan.predictions.crossing_bytes_per_step,
        weight_shares=tuple(held / whole for held in plan.predictions.parameter_bytes),
        imbalance=examination.flops_imbalance(plan),
    )


def traffic(
    arch: Annotated[
        list[str] | None, typer.Option(help=f"By default {', '.join(DEFAULT_ARCHITECTURES)}.")
    ] = None,
    stages: Annotated[list[int] | None, typer.Option(help="Numbers of devices; by default 2 and 4.")] = None,
    size: Annotated[
        int | None, typer.Option(metavar="PIXELS", help="Height and width; by default each one's usual.")
    ] = None,
    json_file: command.JsonOption = None,
) -> None:
    """What crosses in a step and what each device holds, for every way to cut that is worth knowing."""
    for number in stages or ():
        command.check_at_least("--stages", number, 2)
    results = [
        measure_traffic(name, number, size, size)
        for name in arch or DEFAULT_ARCHITECTURES
        for number in stages or WEIGHT_TARGETS
    ]
    command.show_table(
        "counted on fake tensors, weights and states of 2 bytes per number",
        ["", "kind", "MB crossing per step", "weights per device", "above an even share of the FLOPs"],
        [row for result in results for row in result.rows()],
    )
    command.finish("traffic", {"results": [result.to_json() for result in results]}, json_file)


if __name__ == "__main__":
    command.run_command(traffic)
