"""Fills the measured table of the README from the JSON files that the commands write.

asyncdiff demo --picture docs/images/demo.png --json demo.json
asyncdiff bench step --json step.json
python -m asyncdiff.bench.prediction_check --json run.json
python -m asyncdiff.bench.readme README.md --demo demo.json --step step.json --run run.json

`--step` and `--run` may be given several times.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_START = "<!-- measured{name}:"
_END = "<!-- /measured -->"


def measured_table(
    demo: Mapping[str, Any], steps: Sequence[Mapping[str, Any]], runs: Sequence[Mapping[str, Any]] = ()
) -> str:
    """The table in Markdown, from what `asyncdiff demo --json`, `asyncdiff bench step --json` and
    `asyncdiff.bench.prediction_check --json` wrote."""
    environment = steps[0]["environment"]
    cpu = environment["devices"][0]
    rows = [
        "| | in order, one device | asyncdiff | |",
        "|---|---|---|---|",
        f"| `asyncdiff demo` on {_devices(demo)}, seconds of denoising | {demo['seconds_in_order']:.2f} "
        f"| {demo['seconds']:.2f} | **{demo['speedup']:.2f}x**, PSNR {demo['psnr_db']:.1f} dB |",
        *map(_step_row, steps),
        *map(_run_row, runs),
    ]
    versions = environment["packages"]
    machine = (
        f"Measured on {cpu['model']}, {cpu['cores']} cores, torch {versions['torch']}, "
        f"diffusers {versions['diffusers']}, asyncdiff {versions['asyncdiff']}; one core per device on a CPU."
    )
    return "\n".join([*rows, "", machine])


def replace_measured(readme: str, table: str, name: str = "") -> str:
    """`readme` with what stands between the markers replaced; `ValueError` if they are not there. `name`:
    tells several tables of a page apart."""
    start = _START.format(name=f" {name}" if name else "")
    pattern = re.compile(rf"({re.escape(start)}[^\n]*\n).*?({re.escape(_END)})", re.DOTALL)
    replaced, count = pattern.subn(lambda found: f"{found[1]}{table}\n{found[2]}", readme)
    if count != 1:
        raise ValueError(f"The markers {start} ... --> and {_END} must be there once, but are {count} times.")
    return replaced


def _devices(result: Mapping[str, Any]) -> str:
    return ", ".join(result["devices"])


def _model(result: Mapping[str, Any]) -> str:
    layout = ", channels last" if result.get("channels_last") else ""
    return f"{result['arch']}, {result['size']} px, {result['dtype']}{layout} on {_devices(result)}"


def _way(num_stages: int, groups: int, guidance_refresh: int) -> str:
    parts = [
        f"{num_stages} stages" if num_stages > 1 else "",
        "guidance split (exact)" if groups > 1 else "",
        f"guidance refreshed every {guidance_refresh} steps" if guidance_refresh > 1 else "",
    ]
    return ", ".join(filter(None, parts))


def _step_row(step: Mapping[str, Any]) -> str:
    """The ratio, and what it has to be read beside."""
    num_devices = len(step["devices"])
    beside = [f"**{step['ratio']:.2f}x** of the {step['ceiling']:.2f}x this machine can reach"]
    if num_devices > 1:
        beside.append(f"{step['all_threads_ratio']:.2f}x by one process with {num_devices} threads")
        beside.append(f"{step['bytes_per_step'] / 1e6:.2f} MB sent per step")
    way = _way(step["num_stages"], step["groups"], step["guidance_refresh"])
    return (
        f"| `asyncdiff bench step`, {_model(step)}: {way}, milliseconds per step "
        f"| {step['ms_per_step_in_order']:.0f} | {step['ms_per_step']:.0f} | {'; '.join(beside)} |"
    )


def _run_row(run: Mapping[str, Any]) -> str:
    def median(name: str) -> float:
        return statistics.median(each[name] for each in run["repetitions"])

    way = _way(len(run["devices"]), 1, run["guidance_refresh"])
    return (
        f"| `asyncdiff.bench.prediction_check`, {_model(run)}: {way}, seconds of {run['steps']} steps "
        f"| {median('measured_in_order_s'):.0f} | {median('measured_s'):.0f} "
        f"| **{run['speedup']:.2f}x**, {median('predicted_s'):.0f} seconds predicted |"
    )


def main() -> None:
    """The command of the module's docstring."""
    parser = argparse.ArgumentParser(description="Fill the measured table of the README.")
    parser.add_argument("readme", type=Path)
    parser.add_argument("--demo", type=Path, required=True)
    parser.add_argument("--step", type=Path, required=True, action="append")
    parser.add_argument("--run", type=Path, default=[], action="append")
    given = parser.parse_args()
    steps, runs = ([json.loads(file.read_text()) for file in files] for files in (given.step, given.run))
    table = measured_table(json.loads(given.demo.read_text()), steps, runs)
    given.readme.write_text(replace_measured(given.readme.read_text(), table))


if __name__ == "__main__":
    main()
