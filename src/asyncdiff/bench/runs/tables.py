"""The result as tables of text: for the terminal, for the page, and as CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asyncdiff.bench.runs.figures import BenchResult, ConfigurationFigures, Spread

_MB = 1e6
_CSV_HEADS = (
    "configuration", "kind", "devices", "num_stages", "stride", "warmup_steps", "runs",
    "seconds_median", "seconds_lowest", "seconds_highest",
    "speedup_median", "speedup_lowest", "speedup_highest",
    "ideal_speedup", "machine_speedup", "share_of_machine",
)  # fmt: skip
WHOLE_RUN, STEADY_STEP = "whole run", "steady step"


@dataclass(frozen=True)
class Table:
    """`rows` of text under `heads`; `note`: what the figures mean."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def tables(result: BenchResult) -> list[Table]:
    """Every figure but those of single runs and the timelines."""
    found = [_speed(result), _limits(result), _devices(result), _traffic(result)]
    if any(each.run_s is not None for each in result.comparisons):
        found.append(_comparisons(result))
    refused = [(each.name, each.reason) for each in result.skipped]
    refused += [(each.name, each.not_available) for each in result.comparisons if each.not_available]
    if refused:
        found.append(Table("Not available for this model", ("what", "why"), tuple(refused)))
    return found


def machine_rows(result: BenchResult) -> list[tuple[str, str]]:
    """Machine, versions and command."""
    threads = result.threads_per_device
    return [
        ("command", result.command),
        ("model", result.title),
        ("devices", ", ".join(result.devices) + (f"; threads each: {threads}" if threads else "")),
        (
            "run",
            f"{result.steps} steps, {result.warmup_steps} of them warm-up; {result.runs} runs of each kind",
        ),
        *environment_rows(result.environment),
    ]


def environment_rows(environment: dict[str, Any]) -> list[tuple[str, str]]:
    """Machine, platform and versions of `describe_environment`."""
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items() if version)
    devices = [
        f"{each['name']}: {each['model']}, "
        + (f"{each['cores']} cores, " if "cores" in each else "")
        + f"{each['memory_bytes'] / 2**30:.1f} GiB"
        for each in environment["devices"]
    ]
    return [
        ("machine", "; ".join(devices)),
        ("platform", environment["platform"]),
        ("versions", f"python {environment['python']}, {packages}"),
    ]


def _speed(result: BenchResult) -> Table:
    heads = (
        "configuration", "step", "speed-up", "ideal", "machine", "reached",
        "whole run", "speed-up", "ideal", "machine", "reached",
    )  # fmt: skip
    timing = result.in_order.timing
    rows = [("in order", _ms(timing.step_s), "1", "", "", "", _seconds(timing.run_s), "1", "", "", "")]
    rows += [
        (
            each.name,
            _ms(each.timing.step_s),
            _times(each.step_speedup),
            f"{each.ideal_step_speedup:.2f}",
            f"{each.machine_step_speedup:.2f}",
            _percent(each.step_share),
            _seconds(each.timing.run_s),
            _times(each.run_speedup),
            f"{each.ideal_run_speedup:.2f}",
            f"{each.machine_run_speedup:.2f}",
            _percent(each.run_share),
        )
        for each in result.configurations
    ]
    return Table(
        "Speed, stages x stride against in order",
        heads,
        tuple(rows),
        "Medians, in brackets lowest to highest. step: in the steady state. ideal: of the partition, with "
        "transfers free. machine: of a perfect split, with what is left of each device when all compute at "
        "once, measured in the same runs; for a whole run after its warm-up. reached: speed-up over machine.",
    )


def _limits(result: BenchResult) -> Table:
    rows = tuple(
        (
            str(each.devices),
            _times(each.ceiling),
            "-" if each.all_threads is None else _times(each.all_threads),
        )
        for each in result.limits
    )
    return Table(
        "What this machine can do",
        ("devices", "as many whole models at once", "one process with all their cores"),
        rows,
        "Speed-up of a step against one model in order on one device. The last column is the exact "
        "alternative on one CPU; several GPUs do not have it.",
    )


def _devices(result: BenchResult) -> Table:
    heads = (
        "configuration", "device", "compute", "wait", "send", "other",
        "weights", "share", "resident", "GPU peak",
    )  # fmt: skip
    whole = result.in_order
    rows: list[tuple[str, ...]] = [
        (
            "in order", result.devices[0], _one_ms(1e3 * whole.timing.step_s.median), "-", "-", "-",
            _mb(whole.weight_bytes), "100 %", _mb(whole.resident_bytes), _mb_or_none(whole.device_peak_bytes),
        )
    ]  # fmt: skip
    rows += [
        (
            each.name,
            f"{rank}: {device.device}",
            *map(_one_ms, (device.compute_ms, device.wait_ms, device.send_ms, device.other_ms)),
            _mb(device.weight_bytes),
            _percent(device.weight_share),
            _mb(device.resident_bytes),
            _mb_or_none(device.device_peak_bytes),
        )
        for each in result.configurations
        for rank, device in enumerate(each.devices)
    ]
    return Table(
        "Each device: times of a steady step, memory",
        heads,
        tuple(rows),
        "wait: for states of others. other: between rounds; on the first device also noise scheduler and "
        "guidance. weights: of the denoiser. resident: the whole process, imports included.",
    )


def _traffic(result: BenchResult) -> Table:
    heads = (
        "configuration", "split", "balance", "sent per step", "the graph says",
        "step beyond slowest compute", "90th percentile", "start-up",
    )  # fmt: skip
    rows = tuple(
        (
            each.name,
            each.kind,
            f"{each.balance:.3f}",
            f"{each.bytes_per_step / _MB:.3f} MB",
            f"{each.expected_bytes_per_step / _MB:.3f} MB",
            f"{each.overhead_ms[0]:.2f} ms",
            f"{each.overhead_ms[1]:.2f} ms",
            f"{each.start_up_s:.1f} s",
        )
        for each in result.configurations
    )
    return Table(
        "Partition and traffic",
        heads,
        rows,
        "balance: largest stage x stages / sum of the measured blocks, 1 is perfect. start-up: starting the "
        "workers, shipping the weights and a first short run.",
    )


def _comparisons(result: BenchResult) -> Table:
    rows = tuple(
        (
            each.name,
            each.settings,
            str(each.devices),
            _seconds(each.run_s),
            _times(each.run_speedup),
            "not finite" if each.relative_error is None else f"{each.relative_error:.2g}",
        )
        for each in result.comparisons
        if each.run_s is not None and each.run_speedup is not None
    )
    return Table(
        "Other ways, of diffusers",
        ("way", "settings", "devices", "whole run", "speed-up", "error"),
        rows,
        "error: relative L2 distance of the final latents from in order, with random weights.",
    )


def write_csv(result: BenchResult, path: Path) -> None:
    """One row per configuration and kind of run (whole runs, steady steps), seconds and speed-ups."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _CSV_HEADS)
        writer.writeheader()
        writer.writerows(_csv_rows(result))


def _csv_rows(result: BenchResult) -> Iterator[dict[str, Any]]:
    common = {"warmup_steps": "", "runs": result.runs}
    timing = result.in_order.timing
    for kind, spread in ((WHOLE_RUN, timing.run_s), (STEADY_STEP, timing.step_s)):
        yield common | {"configuration": "in order", "kind": kind, "devices": 1} | _spread("seconds", spread)
    for each in result.configurations:
        yield from _csv_configuration(each, common | {"warmup_steps": result.warmup_steps})
    for limit in result.limits:
        named = {
            "as many whole models at once": limit.ceiling,
            "one process with all cores": limit.all_threads,
        }
        for name, speedup in named.items():
            if speedup is not None:
                row = {"configuration": name, "kind": STEADY_STEP, "devices": limit.devices}
                yield common | row | _spread("speedup", speedup)
    for other in result.comparisons:
        if other.run_s is not None and other.run_speedup is not None:
            row = {"configuration": other.name, "kind": WHOLE_RUN, "devices": other.devices}
            yield common | row | _spread("seconds", other.run_s) | _spread("speedup", other.run_speedup)


def _csv_configuration(each: ConfigurationFigures, common: dict[str, Any]) -> Iterator[dict[str, Any]]:
    common = common | {
        "configuration": each.name,
        "devices": len(each.devices),
        "num_stages": each.num_stages,
        "stride": each.stride,
    }
    for kind, spread, speedup, ideal, machine, share in (
        (
            WHOLE_RUN, each.timing.run_s, each.run_speedup,
            each.ideal_run_speedup, each.machine_run_speedup, each.run_share,
        ),
        (
            STEADY_STEP, each.timing.step_s, each.step_speedup,
            each.ideal_step_speedup, each.machine_step_speedup, each.step_share,
        ),
    ):  # fmt: skip
        limits = {"ideal_speedup": ideal, "machine_speedup": machine, "share_of_machine": share}
        yield common | {"kind": kind} | _spread("seconds", spread) | _spread("speedup", speedup) | limits


def _spread(name: str, spread: Spread) -> dict[str, float]:
    return {
        f"{name}_median": spread.median,
        f"{name}_lowest": spread.lowest,
        f"{name}_highest": spread.highest,
    }


def _ms(spread: Spread) -> str:
    return f"{_one_ms(1e3 * spread.median)} ({1e3 * spread.lowest:.1f}-{1e3 * spread.highest:.1f})"


def _one_ms(milliseconds: float) -> str:
    return f"{milliseconds:.1f} ms"


def _seconds(spread: Spread) -> str:
    return f"{spread.median:.2f} s ({spread.lowest:.2f}-{spread.highest:.2f})"


def _times(spread: Spread) -> str:
    return f"{spread.median:.2f} ({spread.lowest:.2f}-{spread.highest:.2f})"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / _MB:.0f} MB"


def _mb_or_none(num_bytes: int) -> str:
    return _mb(num_bytes) if num_bytes else "-"
