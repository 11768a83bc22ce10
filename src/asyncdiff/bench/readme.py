"""Fills the measured table of the README from the JSON files that the commands write.

asyncdiff demo --picture docs/images/demo.png --json demo.json
asyncdiff bench step --json step.json
python -m asyncdiff.bench.readme README.md --demo demo.json --step step.json
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

_START = "<!-- measured{name}:"
_END = "<!-- /measured -->"


def measured_table(demo: dict[str, Any], step: dict[str, Any]) -> str:
    """The table in Markdown, from what `asyncdiff demo --json` and `asyncdiff bench step --json` wrote."""
    environment = step["environment"]
    cpu = environment["devices"][0]
    rows = [
        "| | in order, one device | asyncdiff | |",
        "|---|---|---|---|",
        f"| `asyncdiff demo`, seconds of denoising on {_devices(demo)} | {demo['seconds_in_order']:.2f} "
        f"| {demo['seconds']:.2f} | **{demo['speedup']:.2f}x**, PSNR {demo['psnr_db']:.1f} dB |",
        f"| `asyncdiff bench step`, milliseconds per step on {_devices(step)} "
        f"| {step['ms_per_step_in_order']:.0f} | {step['ms_per_step']:.0f} | {_beside(step)} |",
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


def _devices(result: dict[str, Any]) -> str:
    return ", ".join(result["devices"])


def _beside(step: dict[str, Any]) -> str:
    """The ratio, and what it has to be read beside."""
    return (
        f"**{step['ratio']:.2f}x** of the {step['ceiling']:.2f}x this machine can reach; "
        f"{step['all_threads_ratio']:.2f}x by one process with {len(step['devices'])} threads; "
        f"{step['bytes_per_step'] / 1e6:.2f} MB sent per step"
    )


def main() -> None:
    """The command of the module's docstring."""
    parser = argparse.ArgumentParser(description="Fill the measured table of the README.")
    parser.add_argument("readme", type=Path)
    parser.add_argument("--demo", type=Path, required=True)
    parser.add_argument("--step", type=Path, required=True)
    given = parser.parse_args()
    table = measured_table(json.loads(given.demo.read_text()), json.loads(given.step.read_text()))
    given.readme.write_text(replace_measured(given.readme.read_text(), table))


if __name__ == "__main__":
    main()
