"""The figures of docs/fidelity.md: measured once, kept while nothing changes, and shown as they are."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from asyncdiff.bench import command
from asyncdiff.bench.quality import figures, render, sections
from asyncdiff.bench.quality.results import Generation
from asyncdiff.bench.quality.sections import CONFIGURATIONS, RULES, Section
from asyncdiff.bench.quality.ways import Way
from asyncdiff.demo import held_out_captions

PAGE = "\n".join(
    f"<!-- measured {name}: by a command -->\nold\n<!-- /measured -->" for name in render.MARKERS
)


def run(module: Any, name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit) as ending:
        command.run_command(getattr(module, name))
    assert isinstance(ending.value.code, int)
    return ending.value.code


def small_section(model: str = "demo", name: str = sections.MAIN, **changed: Any) -> Section:
    generation = Generation(model, tuple(held_out_captions(1)), dtype="float32", steps=4, batch_size=1)
    ways = (Way(CONFIGURATIONS[0], *RULES[0]),)
    return Section(name, "4 steps", dataclasses.replace(generation, **changed), ways)


@pytest.mark.filterwarnings("ignore::asyncdiff.pipeline.user_warning.AsyncDiffWarning")
def test_section_is_measured_once_and_again_when_something_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "fidelity.json"
    monkeypatch.setattr(figures, "sections", lambda models, captions: iter([small_section()]))
    for said in ("demo/steps-50: done", "demo/steps-50: kept"):
        assert run(figures, "figures", ["--output", str(output)], monkeypatch) == 0
        assert capsys.readouterr().err.splitlines()[-1] == said
    first = json.loads(output.read_text())
    (section,) = first["sections"].values()
    assert [way["way"]["rule"] for way in section["ways"]] == ["the paper's rule"]
    assert len(section["ways"][0]["psnr_db"]) == 1
    assert section["ways"][0]["prediction_errors"][0] == 0.0
    monkeypatch.setattr(figures, "source_version", lambda model: "another")
    assert run(figures, "figures", ["--output", str(output)], monkeypatch) == 0
    assert "demo/steps-50: done" in capsys.readouterr().err
    again = json.loads(output.read_text())
    assert again["sections"]["demo/steps-50"]["settings"]["source"] == "another"
    summaries = [
        [way["psnr_db"] for way in each["sections"]["demo/steps-50"]["ways"]] for each in (first, again)
    ]
    assert summaries[0] == summaries[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fidelity.json"]


def test_what_fails_in_half_precision_is_said_and_anything_else_is_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*given: Any, **named: Any) -> None:
        raise NotImplementedError('"conv" not implemented\nfor Half')

    monkeypatch.setattr("asyncdiff.bench.quality.measure.measure_quality", fail)
    measured = figures.measure_section(small_section(dtype="float16"))
    assert measured == {"failed": 'NotImplementedError: "conv" not implemented for Half', "ways": []}
    with pytest.raises(NotImplementedError):
        figures.measure_section(small_section())


def test_sources_that_decide_figures_are_counted() -> None:
    assert figures.source_version("demo") == figures.source_version("demo")
    assert len(figures.source_version("demo")) == 16
    root = Path(figures.__file__).parents[2]
    assert all((root / name).is_file() for name in figures._COUNTED)


def test_every_setting_that_was_asked_for_is_a_section_of_each_model() -> None:
    from asyncdiff.demo import DEMO_MODELS

    if not DEMO_MODELS["transformer"].folder.exists():
        pytest.skip("the second bundled model is not there")
    found = list(sections.sections(("demo", "demo-transformer"), 64))
    assert [section.key for section in found[:2]] == ["demo/steps-50", "demo-transformer/steps-50"]
    unet = [section for section in found if section.generation.model == "demo"]
    assert [section.name for section in unet] == [
        "steps-50", "nested", "auto", "steps-25", "euler", "dpm", "guidance", "bfloat16", "float16",
        "refresh-50", "refresh-50-7.5", "refresh-50-12", "refresh-20", "refresh-20-7.5", "refresh-20-12",
        "ways",
    ]  # fmt: skip
    assert {str(way.configuration) for way in unet[0].ways} == {"2x1", "3x1", "4x1", "2x2", "3x2"}
    assert [len(section.ways) // 5 for section in unet[:-1]] == [5, 3, 2, 3, 3, 3, 3, 3, 3, *[1] * 6]
    for section in found:
        usual = 24 if section.name.startswith(sections.REFRESH) else 16
        count = {sections.MAIN: 64, "float16": 8}.get(section.name, usual)
        assert section.generation.captions == tuple(held_out_captions(count))


def test_every_way_to_use_so_many_devices_is_measured_once() -> None:
    asked = [
        way
        for section in sections.sections(("demo",), 64) if section.name in ("steps-50", "refresh-50", "ways")
        for way in section.ways if (way.forecast, way.freshness) == ("latents", "auto")
    ]  # fmt: skip
    found = [(str(way.configuration), way.guidance_refresh) for way in asked]
    everything = {
        (f"{size - stride + 1}x{stride}", refresh)
        for size in (1, 2, 3, 4, 6, 8) for stride in range(1, size + 1) for refresh in (1, 2, 4)
        if refresh == 1 or stride == 1
    } - {("1x1", 1)}  # fmt: skip
    assert set(found) == everything
    assert [each for each in found if found.count(each) > 1] == [("2x1", 1)] * 2, "beside refreshed guidance"


def _row(way: Way, psnr_db: float, worst_db: float, steps: tuple[int, ...] = (0,)) -> dict[str, Any]:
    summary = {"psnr_mean_db": psnr_db, "psnr_worst_tenth_db": worst_db, "speedup": 1.875}
    return {
        "way": {"rule": way.rule, **way.settings},
        "split": "chain",
        "summary": summary,
        "prediction_errors": [0.0, 0.01, 0.02],
        "steps_in_order": [list(steps)],
    }


def _content() -> dict[str, Any]:
    """Invented: linear gains at 2x1 and loses at 3x2."""
    settings = {"generation": {"num_captions": 64, "steps": 50}, "ways": [], "source": "s"}
    common = {
        "model": "demo", "settings": settings, "failed": None, "skipped": [], "pipeline": "Pipe",
        "scheduler": "DDIMScheduler", "guidance_scale": 4.0, "dtype": "float32",
        "environment": {"packages": {"torch": "2", "diffusers": "0"}},
    }  # fmt: skip
    pairs = [
        (Way(CONFIGURATIONS[0], *RULES[0]), 36.04, 33.0),
        (Way(CONFIGURATIONS[0], *RULES[1]), 49.96, 45.0),
        (Way(CONFIGURATIONS[4], *RULES[0]), 30.0, 28.0),
        (Way(CONFIGURATIONS[4], *RULES[1]), 37.0, 27.5),
    ]
    auto = [
        _row(dataclasses.replace(way, warmup_steps="auto"), psnr + 2, worst, (0, 1, 2))
        for way, psnr, worst in pairs[1::2]
    ]
    return {
        "command": "as it was",
        "sections": {
            "demo/steps-50": {
                **common, "name": "steps-50", "title": "50 steps", "ways": [_row(*each) for each in pairs]
            },
            "demo/refresh-50": {
                **common, "name": "refresh-50", "title": "50 steps, guidance 4",
                "ways": [_row(Way(CONFIGURATIONS[0], "latents", "auto", guidance_refresh=4), 44.0, 41.0)],
            },
            "demo/auto": {**common, "name": "auto", "title": "automatic", "ways": auto},
            "demo/float16": {
                **common, "name": "float16", "title": "float16", "failed": "no Half", "ways": []
            },
        },
    }  # fmt: skip


def test_tables_say_what_was_gained_and_where_nothing_was() -> None:
    filled = render.fill(PAGE, _content(), [("a plot", "images/a.png")])
    assert "| 2x1 | 36.0 (33.0) | 50.0 (45.0) | +13.9 | +10 | 1.88x |" in filled
    assert "| 3x2 | 30.0 (28.0) | 37.0 (27.5) | +7.0 | +6 | 1.88x |" in filled
    assert "Does not help, against the paper's rule: 3x2 linear (worst tenth -0.5 dB)." in filled
    assert (
        "3x2, the fastest, is closer to the original (37.0 dB) than the paper's rule at 2x1 (36.0 dB)"
        in filled
    )
    assert "| 2x1 | linear | 50.0 (45.0) | 52.0 (45.0) | 3 | 1.88x | 1.88x |" in filled
    assert "Could not be run: no Half" in filled
    assert "![a plot](images/a.png)" in filled
    assert "mean of 64 held-out captions, in brackets that of the worst tenth; 50 steps" in filled
    assert "split: chain" in filled
    assert "| stages x stride | reads | 50 steps, guidance 4 |" in filled
    assert "| 2x1 | latents, fresh reads, guidance every 4 | 44.0 (41.0) |" in filled
    assert "as it was" in filled
    assert "old" not in filled.split()


def test_page_and_plots_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs" / "images").mkdir(parents=True)
    page, measured = tmp_path / "docs" / "fidelity.md", tmp_path / "fidelity.json"
    page.write_text(PAGE)
    figures.write(_content(), measured)
    images = str(tmp_path / "docs" / "images")
    arguments = [str(page), "--figures", str(measured), "--images", images]
    assert run(render, "render", arguments, monkeypatch) == 0
    names = ["fidelity-demo-speed.png", "fidelity-demo-steps.png"]
    assert sorted(path.name for path in Path(images).iterdir()) == names
    assert all(f"](images/{name})" in page.read_text() for name in names)
    once = page.read_text()
    assert run(render, "render", arguments, monkeypatch) == 0
    assert page.read_text() == once


def test_numbers_are_written_on_one_line_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    content = {"command": "c", "sections": {"a": {"x": [1.23456789, None, 2], "names": ["[1, 2]"]}}}
    figures.write(content, path)
    assert figures.read(path) == {
        "command": "c",
        "sections": {"a": {"x": [1.2346, None, 2], "names": ["[1, 2]"]}},
    }
    assert "[ 1.2346, null, 2 ]" in path.read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--output", "missing/f.json"], "the folder missing does not exist"),
        (["--output", "f.json", "--models", "demo,sdxl"], "'sdxl' is none of demo, demo-transformer"),
        (
            ["--output", "f.json", "--models", "demo", "--only", "steps-5"],
            "--only steps-5: is none of steps-50",
        ),
        (["--output", "f.json", "--captions", "0"], "--captions 0: must be 1 or more"),
        (["--output", "text.json"], "text.json: is no JSON"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.json").write_text("figures")
    assert run(figures, "figures", arguments, monkeypatch) == 2
    assert said in capsys.readouterr().err


def test_page_without_markers_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page, measured = tmp_path / "page.md", tmp_path / "f.json"
    page.write_text("nothing")
    figures.write({"command": "", "sections": {}}, measured)
    arguments = [str(page), "--figures", str(measured), "--images", str(tmp_path)]
    assert run(render, "render", arguments, monkeypatch) == 2
    assert "measured gain" in capsys.readouterr().err
    assert page.read_text() == "nothing"


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys\nfrom asyncdiff.bench.quality import figures, render\n"
        "assert not {'torch', 'numpy', 'matplotlib'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
