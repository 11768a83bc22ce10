"""The README's table comes from the commands' own figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from asyncdiff.bench.environment import describe_environment
from asyncdiff.bench.readme import measured_table, replace_measured

ROOT = Path(__file__).parents[2]
DEMO = {"seconds_in_order": 4.0, "seconds": 2.0, "speedup": 2.0, "psnr_db": 41.26, "devices": ["cpu", "cpu"]}
STEP = {
    "ms_per_step_in_order": 1000.4,
    "ms_per_step": 520.0,
    "ratio": 1.92,
    "ceiling": 1.97,
    "all_threads_ratio": 1.89,
    "bytes_per_step": 3_250_000,
    "devices": ["cpu", "cpu"],
    "arch": "sd21",
    "size": 256,
    "dtype": "bfloat16",
    "num_stages": 2,
    "groups": 1,
    "guidance_refresh": 1,
}
RUN = {
    **{name: STEP[name] for name in ("arch", "size", "dtype", "devices")},
    "guidance_refresh": 4,
    "steps": 50,
    "repetitions": [
        {"measured_in_order_s": 90.0, "measured_s": 31.0, "predicted_s": 29.0},
        {"measured_in_order_s": 93.0, "measured_s": 30.0, "predicted_s": 28.0},
        {"measured_in_order_s": 91.0, "measured_s": 33.0, "predicted_s": 30.0},
    ],
    "speedup": 3.05,
}


def test_table_holds_the_figures_and_the_machine() -> None:
    table = measured_table(DEMO, [{**STEP, "environment": describe_environment()}])
    for figure in (
        "4.00",
        "2.00",
        "2.00x",
        "41.3 dB",
        "1000",
        "520",
        "1.92x",
        "1.97x",
        "3.25 MB",
        "torch 2.",
    ):
        assert figure in table


def test_table_has_a_row_for_every_way() -> None:
    step = {**STEP, "environment": describe_environment()}
    split = {**step, "num_stages": 1, "groups": 2}
    refreshed = {**step, "num_stages": 1, "guidance_refresh": 2, "devices": ["cpu"]}
    table = measured_table(DEMO, [step, split, refreshed], [RUN])
    *_, two_stages, halves, alone, run, _, _ = table.splitlines()
    assert "sd21, 256 px, bfloat16 on cpu, cpu: 2 stages, milliseconds" in two_stages
    assert "guidance split (exact), milliseconds" in halves
    assert "on cpu: guidance refreshed every 2 steps, milliseconds" in alone
    assert "threads" not in alone
    assert "bfloat16, channels last on cpu" in measured_table(DEMO, [{**step, "channels_last": True}])
    assert "2 stages, guidance refreshed every 4 steps, seconds of 50 steps | 91 | 31 | **3.05x**, 29 " in run


def test_readme_has_the_markers_and_only_what_is_between_them_changes() -> None:
    readme = (ROOT / "README.md").read_text()
    filled = replace_measured(readme, "| new |")
    assert "| new |" in filled
    assert replace_measured(filled, "| newer |").count("| new |") == 0
    assert filled.partition("<!-- measured")[0] == readme.partition("<!-- measured")[0]
    assert filled.partition("<!-- /measured")[2] == readme.partition("<!-- /measured")[2]


def test_missing_markers_are_refused() -> None:
    with pytest.raises(ValueError, match="markers"):
        replace_measured("# nothing", "| new |")
