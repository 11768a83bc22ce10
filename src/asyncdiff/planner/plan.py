"""A plan: which stage runs what, by which settings, on which devices, and what to expect of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from asyncdiff.config import Settings, check_count
from asyncdiff.errors import ConfigurationError
from asyncdiff.graph import Atom, BlockGraph, Partition
from asyncdiff.planner.costs import estimate_driver_seconds, estimate_seconds
from asyncdiff.planner.description import describe
from asyncdiff.planner.freshness import FreshRead, fresh_reads, leads
from asyncdiff.planner.names import atom_of, block_name, partition_by_names
from asyncdiff.planner.partitioning import (
    DEFAULT_IMBALANCE,
    check_speeds,
    partition_chain,
    partition_nested,
    slowest_of_groups,
)
from asyncdiff.planner.plan_file import fields_from_json, fields_to_json
from asyncdiff.planner.predictions import Predictions, predict
from asyncdiff.schedule.builder import KINDS


@dataclass(frozen=True)
class Plan:
    """Everything that decides how a denoiser is divided; saved as JSON, edited by hand, passed back.

    `kind`: `"chain"` or `"nested"`. `stages`: per stage, the module names of its blocks (`partition_by_names`
    says what a name covers). `devices`: one per rank (`num_stages + stride - 1`), group after group where
    `groups` of them share the batch of a call, each divided likewise; or a single one that runs everything in
    turn. `fresh`: (leaf, reading segment) of what arrives in time to be read in the round
    that produces it; with freshness "paper" nothing. `tolerance`, `guidance_refresh` as in `Settings`.
    `threads_per_device`: intra-op threads of a CPU worker, None for whatever it has. `predictions`: None
    where nothing was predicted. Raises `ConfigurationError` for values that do not fit.
    """

    kind: str
    stages: tuple[tuple[str, ...], ...]
    devices: tuple[str, ...]
    stride: int = 1
    warmup_steps: int = 1
    time_shift: bool = False
    forecast: str = "latents"
    freshness: str = "auto"
    fresh: tuple[tuple[str, int], ...] = ()
    tolerance: float | None = None
    threads_per_device: int | None = None
    predictions: Predictions | None = None
    groups: int = 1
    guidance_refresh: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigurationError(f'A plan\'s kind must be "chain" or "nested", but it is {self.kind!r}.')
        if not self.stages or not all(self.stages):
            raise ConfigurationError("Every stage of a plan must name at least one block.")
        if len(self.devices) not in (1, self.settings.num_workers):
            raise ConfigurationError(
                f"A plan of {self.num_stages} stages with stride={self.stride} needs "
                f"{self.settings.num_workers} devices (num_stages + stride - 1{self._in_groups}), or one "
                f"that runs them all in turn, but it lists {len(self.devices)}."
            )
        if self.guidance_refresh > 1 and self.kind == "nested" and self.num_stages > 1:
            raise ConfigurationError(
                f"guidance_refresh={self.guidance_refresh} goes with a chain: in a nested split no stage "
                'works ahead. Use partition="chain".'
            )
        if self.fresh and self.freshness == "paper":
            raise ConfigurationError('A plan with freshness "paper" reads nothing fresh, but lists leaves.')
        if self.threads_per_device is not None:
            check_count("threads_per_device", self.threads_per_device)

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    @property
    def settings(self) -> Settings:
        return Settings(
            self.num_stages,
            self.stride,
            self.warmup_steps,
            self.time_shift,
            self.forecast,
            self.freshness,
            self.tolerance,
            self.groups,
            self.guidance_refresh,
        )

    @property
    def _in_groups(self) -> str:
        return f" in each of {self.groups} groups" if self.groups > 1 else ""

    @property
    def num_workers(self) -> int:
        return self.settings.num_workers

    @property
    def fresh_atoms(self) -> frozenset[tuple[Atom, int]]:
        """`fresh` by leaf and reading segment; `ConfigurationError` for what is no leaf's name."""
        return frozenset((atom_of(name), reader) for name, reader in self.fresh)

    def partition(self, graph: BlockGraph) -> Partition:
        """The partition of this graph; `ConfigurationError` if the names do not divide it as `kind` says."""
        partition = partition_by_names(graph, self.stages)
        if self.num_stages > 1 and partition.kind != self.kind:
            raise ConfigurationError(
                f"The plan says {self.kind}, but its stages are {partition.kind}: the last block is on stage "
                f"{partition.stage_of[graph.blocks[-1].key]}."
            )
        return replace(partition, kind=self.kind)

    def describe(self) -> str:
        """A short table: per stage its devices, blocks, share of the cost and of the weights."""
        return describe(self)

    def to_json(self) -> str:
        """The plan as JSON text; `from_json` gives an equal plan back."""
        return fields_to_json(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what `to_json` wrote; `ConfigurationError` for unknown keys, versions and wrong types."""
        return cls(**fields_from_json(text))

    def save(self, path: str | Path) -> None:
        """Write the plan as a JSON file."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan from a JSON file; errors as `from_json`, `OSError` where the file cannot be read."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"))


def make_plan(
    graph: BlockGraph,
    settings: Settings,
    devices: Sequence[str],
    *,
    kind: str = "chain",
    partition: Partition | None = None,
    speeds: Sequence[float] | None = None,
    dtype: str = "float32",
    threads_per_device: int | None = None,
    imbalance: float = DEFAULT_IMBALANCE,
    max_weight_share: float | None = None,
    driver_seconds: float | None = None,
) -> Plan:
    """The plan for a graph on devices: the best partition of `kind`, or the one given, with its predictions.

    `devices` as in `Plan`, `imbalance`, `max_weight_share` and `driver_seconds` as in `partition_chain`, and
    `speeds` too, of all groups' devices; with groups, `graph` is that of a call with one group's part of the
    batch. `dtype` of the weights and the kind of the first device choose the cost estimate where
    blocks have not been measured, and that of the driver's work where it is None.
    """
    device_kind = devices[0].split(":")[0] if devices else "cpu"
    seconds = estimate_seconds(graph, device_kind, dtype)
    if driver_seconds is None:
        driver_seconds = estimate_driver_seconds(graph, device_kind, dtype)
    stride = settings.stride
    all_speeds = speeds
    if speeds is not None:
        check_speeds(settings.num_stages, stride, speeds, settings.groups)
        speeds = slowest_of_groups(speeds, settings.groups)
    if partition is None:
        if kind not in KINDS:
            raise ConfigurationError(f'kind must be "chain" or "nested", but {kind!r} was given.')
        cut = partition_nested if kind == "nested" else partition_chain
        partition = cut(
            graph,
            settings.num_stages,
            speeds=speeds,
            stride=stride,
            seconds=seconds,
            imbalance=imbalance,
            max_weight_share=max_weight_share,
            driver_seconds=driver_seconds,
        )
    if partition.num_stages != settings.num_stages:
        raise ConfigurationError(
            f"num_stages={settings.num_stages}, but the partition has {partition.num_stages} stages."
        )
    fresh: tuple[FreshRead, ...] = ()
    if settings.freshness == "auto":
        fresh = fresh_reads(
            graph,
            partition,
            seconds,
            stride=stride,
            speeds=speeds,
            driver_seconds=driver_seconds,
            device_kind=device_kind,
        )
    predictions = predict(
        graph,
        partition,
        seconds,
        stride=stride,
        speeds=speeds,
        driver_seconds=driver_seconds,
        fresh_leads=leads(fresh),
    )
    return Plan(
        kind=partition.kind,
        stages=tuple(tuple(block_name(key, graph) for key in keys) for keys in partition.stages),
        devices=tuple(devices),
        stride=stride,
        warmup_steps=settings.warmup_steps,
        time_shift=settings.time_shift,
        forecast=settings.forecast,
        freshness=settings.freshness,
        tolerance=settings.tolerance,
        fresh=tuple((str(read.atom), read.reader) for read in fresh),
        threads_per_device=threads_per_device,
        predictions=replace(predictions, speeds=None if all_speeds is None else tuple(all_speeds)),
        groups=settings.groups,
        guidance_refresh=settings.guidance_refresh,
    )
