"""What is shown of a result is in its JSON, and the page needs nothing from elsewhere."""

from __future__ import annotations

import csv
import dataclasses
import html.parser
import json
import types
import typing
from pathlib import Path
from typing import Any

import pytest

from asyncdiff.bench.runs import figures
from asyncdiff.bench.runs.figures import (
    BenchResult,
    ComparisonFigures,
    ConfigurationFigures,
    DeviceFigures,
    InOrder,
    MachineLimit,
    Skipped,
    Spread,
    TimelineSpan,
    Timing,
)
from asyncdiff.bench.runs.page import page
from asyncdiff.bench.runs.tables import machine_rows, tables, write_csv


def spread(median: float) -> Spread:
    return Spread(median, median * 0.9, median * 1.25, (median * 0.95, median, median * 1.2))


def configuration(num_stages: int, stride: int, peak_bytes: int) -> ConfigurationFigures:
    count = num_stages + stride - 1
    devices = tuple(
        DeviceFigures(
            device=f"cuda:{rank}" if peak_bytes else "cpu",
            compute_ms=300 + 10 * rank, wait_ms=2.5 * rank, send_ms=1.25, other_ms=7 - rank,
            weight_bytes=10**9 // num_stages, weight_share=1 / num_stages,
            resident_bytes=2 * 10**9 + rank, device_peak_bytes=peak_bytes * (rank + 1),
        )
        for rank in range(count)
    )  # fmt: skip
    spans = [
        TimelineSpan(rank, f"stage {rank} step {step}", "compute", 320 * step + 4 * rank, 320 * step + 310)
        for rank in range(count)
        for step in range(3)
    ]
    spans += [TimelineSpan(1, "wait for it", "wait", 330, 345), TimelineSpan(0, "send", "transfer", 500, 512)]
    return ConfigurationFigures(
        name=f"{num_stages}x{stride}", num_stages=num_stages, stride=stride, kind="nested", balance=1.0123,
        timing=Timing(spread(6.789), spread(0.3211)),
        step_speedup=spread(1.87 * stride), run_speedup=spread(1.71 * stride),
        ideal_step_speedup=1.98 * stride, machine_step_speedup=1.9 * stride,
        ideal_run_speedup=1.83 * stride, machine_run_speedup=1.76 * stride,
        overhead_ms=(3.21, 6.54), bytes_per_step=5406720.0, expected_bytes_per_step=5406720.0,
        start_up_s=12.3, devices=devices, timeline=tuple(spans),
    )  # fmt: skip


def result(peak_bytes: int = 0) -> BenchResult:
    """Invented, with everything that there can be."""
    return BenchResult(
        title="sd99 <tiny>, 64 px, float32",
        workload={"arch": "sd99", "model": None, "size": 64, "dtype": "float32", "prompt": ""},
        devices=("cuda:0", "cuda:1", "cuda:2") if peak_bytes else ("cpu", "cpu", "cpu"),
        threads_per_device=None if peak_bytes else 1,
        warmup_steps=1,
        steps=20,
        runs=3,
        in_order=InOrder(Timing(spread(12.34), spread(0.6)), 10**9, 3 * 10**9, 2 * peak_bytes),
        limits=(
            MachineLimit(2, spread(1.9), None if peak_bytes else spread(1.6)),
            MachineLimit(3, spread(2.7), None if peak_bytes else spread(2.1)),
        ),
        configurations=(configuration(2, 1, peak_bytes), configuration(2, 2, peak_bytes)),
        skipped=(Skipped("1x3", "stride=3 needs something & more"),),
        comparisons=(
            ComparisonFigures("ring attention", 2, "degree 2", spread(8.0), spread(1.5), 0.0, None),
            ComparisonFigures("a cache", 1, "threshold 0.2", None, None, None, "not for this one"),
        ),
        environment={
            "python": "3.11.7",
            "platform": "Linux",
            "packages": {"asyncdiff": "0.1.0", "torch": "2.13.0", "peft": None},
            "devices": [{"name": "cpu", "model": "A <fast> one", "memory_bytes": 2**34, "cores": 4}],
        },
        command="asyncdiff bench --arch sd99 --html '<here>.html'",
    )


def from_json(kind: Any, value: Any) -> Any:
    """A figure of the given type from its JSON."""
    if dataclasses.is_dataclass(kind):
        types_of = typing.get_type_hints(kind, vars(figures))
        names = [field.name for field in dataclasses.fields(kind)]
        return kind(**{name: from_json(types_of[name], value[name]) for name in names})
    if typing.get_origin(kind) is tuple:
        return tuple(from_json(typing.get_args(kind)[0], each) for each in value)
    if isinstance(kind, types.UnionType) and value is not None:
        return from_json(typing.get_args(kind)[0], value)
    return value


@pytest.mark.parametrize("peak_bytes", [0, 10**9])
def test_json_has_everything_that_is_shown(peak_bytes: int, tmp_path: Path) -> None:
    shown = result(peak_bytes)
    again = from_json(BenchResult, json.loads(json.dumps(shown.to_json(), allow_nan=False)))
    assert again == shown
    assert tables(again) == tables(shown)


def test_json_has_the_shares() -> None:
    written = result().to_json()["configurations"][0]
    assert (written["step_share"], written["run_share"]) == (1.87 / 1.9, 1.71 / 1.76)


class Page(html.parser.HTMLParser):
    """Its texts, and all that it refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "action")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.mark.parametrize("peak_bytes", [0, 10**9])
def test_page_shows_every_table_and_refers_to_nothing(peak_bytes: int) -> None:
    shown = result(peak_bytes)
    text_of_page = page(shown)
    read = Page(text_of_page)
    cells = [cell for table in tables(shown) for row in (table.heads, *table.rows) for cell in row if cell]
    facts = [text for row in machine_rows(shown) for text in row]
    assert len(cells) > 100
    for text in (*cells, *facts, *(table.note for table in tables(shown) if table.note)):
        assert text in read.texts
    assert len(read.references) == 3
    assert all(each.startswith("data:image/svg+xml;base64,") for each in read.references)
    assert not {"script", "link", "iframe"} & set(read.tags)
    assert "@import" not in text_of_page
    assert "url(" not in text_of_page


def test_plots_are_labelled_and_refer_to_nothing() -> None:
    import base64

    texts = [
        base64.b64decode(each.partition(",")[2]).decode() for each in Page(page(result(10**9))).references
    ]
    assert "metadata" not in "".join(texts)
    speed, timeline, memory = texts
    for label in ("2x1 steady step", "2x2 whole run", "ring attention", "what this machine allows"):
        assert label in speed
    assert "a cache" not in speed  # there is nothing to show of it
    assert "2x2: stages 2, stride 2" in timeline
    assert "at its peak" in memory
    for svg in texts:
        outside = [part for part in svg.split('href="')[1:] if not part.startswith("#")]
        assert not outside


def test_csv_has_a_row_per_configuration_and_kind_of_run(tmp_path: Path) -> None:
    shown = result()
    write_csv(shown, tmp_path / "b.csv")
    rows = list(csv.DictReader((tmp_path / "b.csv").open()))
    kinds = [(row["configuration"], row["kind"]) for row in rows]
    both = ("whole run", "steady step")
    assert kinds[:6] == [(name, kind) for name in ("in order", "2x1", "2x2") for kind in both]
    assert kinds[6:] == [
        *(("as many whole models at once", "steady step"), ("one process with all cores", "steady step")) * 2,
        ("ring attention", "whole run"),
    ]
    each = shown.configurations[1]
    assert rows[5] == {
        "configuration": "2x2", "kind": "steady step", "devices": "3", "num_stages": "2", "stride": "2",
        "warmup_steps": "1", "runs": "3",
        "seconds_median": str(each.timing.step_s.median), "seconds_lowest": str(each.timing.step_s.lowest),
        "seconds_highest": str(each.timing.step_s.highest),
        "speedup_median": str(each.step_speedup.median), "speedup_lowest": str(each.step_speedup.lowest),
        "speedup_highest": str(each.step_speedup.highest), "ideal_speedup": str(each.ideal_step_speedup),
        "machine_speedup": str(each.machine_step_speedup), "share_of_machine": str(each.step_share),
    }  # fmt: skip
