"""The tables of docs/choosing.md, from files of which every figure is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from asyncdiff.bench import choosing
from asyncdiff.bench.choosing import Division, Fidelity, Predicted
from asyncdiff.bench.configurations import Configuration
from asyncdiff.bench.quality.sections import NUM_DEVICES
from asyncdiff.bench.quality.ways import Way
from asyncdiff.cli.app import build_app
from asyncdiff.cli.failures import run

ENVIRONMENT = {"devices": [{"model": "a processor"}], "packages": {"torch": "1", "diffusers": "2"}}


def candidate(division: Division, speedup: float, **changed: Any) -> dict[str, Any]:
    count = division.groups * (division.num_stages + division.stride - 1)
    weights = [100 // division.num_stages] * division.num_stages
    known = {"controlnet": "serial", "warmup_steps": 1, "devices": ["cpu"] * count, "speedup": speedup}
    return {**vars(division), **known, "weight_bytes": weights, "bytes_per_step": 2.5e6, **changed}


def predicted(*candidates: dict[str, Any]) -> Predicted:
    whole = candidate(Division(1, 1, 1, 1), 1.0)
    head = {"arch": "sdxl", "model": None, "size": 1024, "dtype": "float16", "steps": 50, "latency_s": 1e-5}
    told = {"times": "measured", "command": "asyncdiff plan", "bandwidth_bytes_per_s": 25e9}
    return Predicted({**head, **told, "environment": ENVIRONMENT, "candidates": [whole, *candidates]})


def measured(name: str, *rows: tuple[str, int, float]) -> dict[str, Any]:
    def row(configuration: str, refresh: int, psnr_db: float) -> dict[str, Any]:
        stages, stride = map(int, configuration.split("x"))
        way = Way(Configuration(stages, stride), "latents", "auto", guidance_refresh=refresh)
        summary = {"psnr_mean_db": psnr_db, "psnr_worst_tenth_db": psnr_db - 5}
        return {"way": {"rule": way.rule, **way.settings}, "summary": summary}

    return {"model": "demo", "name": name, "ways": [row(*each) for each in rows]}


FIDELITY = Fidelity(
    {
        "command": "figures",
        "sections": {
            "demo/steps-50": measured("steps-50", ("2x1", 1, 60.0)),
            "demo/ways": measured("ways", ("2x1", 1, 10.0), ("1x2", 1, 55.0), ("4x1", 4, 45.0)),
        },
    }
)


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_ways_are_listed_with_speed_memory_traffic_and_fidelity() -> None:
    plan = predicted(
        candidate(Division(2, 1, 1, 1), 1.9),
        candidate(Division(1, 1, 2, 1), 1.95),
        candidate(Division(1, 2, 1, 1), 1.8),
        candidate(Division(2, 1, 1, 2), 2.5),
        candidate(Division(4, 1, 1, 1), 3.8),
        candidate(Division(1, 1, 1, 1), 7.0, controlnet="overlap", devices=["cpu"] * 2),
        candidate(Division(2, 1, 1, 1), 1.0, warmup_steps=5),
    )
    assert cells(choosing.table(2, [plan], FIDELITY)) == [
        ["refreshed every 2 steps", "2", "1", "2.50x", "50%", "2.50", "not measured"],
        ["split **(auto)**", "1", "1", "1.95x", "100%", "2.50", "exact"],
        ["together", "2", "1", "1.90x", "50%", "2.50", "60.0 (55.0)"],
        ["together", "1", "2", "1.80x", "100%", "2.50", "55.0 (50.0)"],
    ]


def test_groups_have_the_fidelity_of_their_stages() -> None:
    plan = predicted(candidate(Division(2, 1, 2, 1), 3.7))
    (row,) = cells(choosing.table(4, [plan], FIDELITY))
    assert (row[0], row[-1]) == ("split **(auto)**", "60.0 (55.0)")


def test_plans_stand_side_by_side() -> None:
    one, other = (
        predicted(candidate(Division(2, 1, 1, 1), 1.5)),
        predicted(candidate(Division(1, 2, 1, 1), 1.6)),
    )
    rows = cells(choosing.table(2, [one, other], FIDELITY))
    assert [row[3:9] for row in rows] == [
        ["1.50x", "50%", "2.50", "", "", ""],
        ["", "", "", "1.60x", "100%", "2.50"],
    ]


def test_page_is_filled_by_the_command(tmp_path: Path) -> None:
    page, plan, fidelity = (tmp_path / name for name in ("page.md", "plan.json", "fidelity.json"))
    marks = "".join(
        f"<!-- measured {name}: x -->\nold\n<!-- /measured -->\n" for name in (*NUM_DEVICES, "sources")
    )
    page.write_text(marks)
    command = [
        "plan",
        "--arch",
        "demo",
        "--devices",
        "cpu,cpu",
        "--guidance-refresh",
        "2",
        "--json",
        str(plan),
    ]
    assert run(build_app(), command) == 0
    fidelity.write_text(json.dumps(FIDELITY.content))
    choosing.choosing(page, [plan], fidelity)
    filled = page.read_text()
    assert "old" not in filled
    assert "| split **(auto)** | 1 | 1 |" in filled
    assert "| refreshed every 2 steps | 2 | 1 |" in filled
    assert "estimated from FLOPs" in filled


@pytest.mark.parametrize(
    ("content", "problem"), [("{", "cannot be read as JSON"), ("[]", "was not written by asyncdiff plan")]
)
def test_other_files_are_refused(tmp_path: Path, content: str, problem: str) -> None:
    page, plan = tmp_path / "page.md", tmp_path / "plan.json"
    page.touch()
    plan.write_text(content)
    with pytest.raises(choosing.ConfigurationError, match=problem):
        choosing.choosing(page, [plan], page)


def test_what_auto_takes_is_what_parallelize_does() -> None:
    """docs/choosing.md, first section."""
    taken = {count: choosing.what_auto_takes(count) for count in NUM_DEVICES}
    assert {count: (each.groups, each.num_stages) for count, each in taken.items()} == {
        2: (2, 1), 3: (1, 3), 4: (2, 2), 6: (2, 3), 8: (2, 4)
    }  # fmt: skip
