"""Fills docs/fidelity.md with tables and plots, from what `asyncdiff.bench.quality.figures` wrote.

python -m asyncdiff.bench.quality.render docs/fidelity.md

The page has a pair of markers for each: `<!-- measured gain: -->` (50 steps), `settings` (everything else),
`auto` (automatic warm-up), `refresh` (guidance refreshed) and `plots`, each closed by `<!-- /measured -->`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from asyncdiff.bench import command
from asyncdiff.bench.quality import figures
from asyncdiff.bench.quality.results import way_from_json
from asyncdiff.bench.quality.sections import AUTO_WARMUP, CONFIGURATIONS, MAIN, REFRESH, RULES, WAYS
from asyncdiff.bench.quality.ways import Way
from asyncdiff.bench.readme import replace_measured
from asyncdiff.errors import ConfigurationError

MARKERS = ("gain", "settings", "auto", "refresh", "plots")

# What the forecast was built to gain over the paper's rule at 50 steps, in dB.
AIMS_DB = {"2x1": 10.0, "3x1": 8.0, "4x1": 6.0, "2x2": 8.0, "3x2": 6.0}
_FASTEST, _SLOWEST = "3x2", "2x1"
_RULES = tuple(Way(CONFIGURATIONS[0], *rule).rule for rule in RULES)
_PAPER = _RULES[0]
_DOTS_PER_INCH = 120


class Measured:
    """One section. Rows by (stages x stride, rule); without any where it failed."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self.rows: dict[tuple[str, str], dict[str, Any]] = {}
        for each in values["ways"]:
            way = way_from_json(each)
            self.rows[str(way.configuration), way.rule] = each

    def psnr_db(self, configuration: str, rule: str) -> float | None:
        """Mean; infinite where no picture differs, None where there is no such row."""
        return self._decibels(configuration, rule, "psnr_mean_db")

    def worst_tenth_db(self, configuration: str, rule: str) -> float | None:
        return self._decibels(configuration, rule, "psnr_worst_tenth_db")

    def _decibels(self, configuration: str, rule: str, name: str) -> float | None:
        row = self.rows.get((configuration, rule))
        if row is None:
            return None
        value = row["summary"][name]
        return math.inf if value is None else float(value)

    @property
    def configurations(self) -> list[str]:
        return list(dict.fromkeys(configuration for configuration, _ in self.rows))

    @property
    def rules(self) -> list[str]:
        return list(dict.fromkeys(rule for _, rule in self.rows))


def read_sections(content: Mapping[str, Any]) -> dict[str, dict[str, Measured]]:
    """Model -> section's name -> section."""
    found: dict[str, dict[str, Measured]] = {}
    for values in content["sections"].values():
        found.setdefault(values["model"], {})[values["name"]] = Measured(values)
    return found


def cell(section: Measured, configuration: str, rule: str) -> str:
    """Mean PSNR in dB and in brackets that of the worst tenth; empty where there is no such row."""
    mean, worst = section.psnr_db(configuration, rule), section.worst_tenth_db(configuration, rule)
    return "" if mean is None or worst is None else f"{_decibels(mean)} ({_decibels(worst)})"


def gain_tables(models: Mapping[str, Mapping[str, Measured]]) -> str:
    """At 50 steps: every rule, the gain of the best over the paper's, and what was aimed at."""
    parts = []
    for model, sections in models.items():
        if MAIN in sections:
            parts += [f"**{_title(model, sections[MAIN])}**", "", *_gain_table(sections[MAIN]), ""]
    return "\n".join(parts)


def _gain_table(section: Measured) -> Iterator[str]:
    rules = section.rules
    heads = ["stages x stride", *rules, "gain of the best", "aim", "its speed-up, simulated"]
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * len(heads)
    for configuration in section.configurations:
        cells = [configuration, *(cell(section, configuration, rule) for rule in rules), "", "", ""]
        best = _best(section, configuration)
        if best is not None:
            rule, gain = best
            cells[-3:] = [f"{gain:+.1f}", _aim(configuration), _speedup(section, configuration, rule)]
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield _note(section)
    yield ""
    yield " ".join([*_fastest_against_slowest(section), where_it_does_not_help(section)])


def _best(section: Measured, configuration: str) -> tuple[str, float] | None:
    """The rule that gains most over the paper's in the mean, and how much."""
    paper = section.psnr_db(configuration, _PAPER)
    found = {rule: section.psnr_db(configuration, rule) for rule in section.rules if rule != _PAPER}
    gains = [(psnr - paper, rule) for rule, psnr in found.items() if psnr is not None and paper is not None]
    return None if not gains else (max(gains)[1], max(gains)[0])


def _aim(configuration: str) -> str:
    return f"{AIMS_DB[configuration]:+g}" if configuration in AIMS_DB else ""


def _fastest_against_slowest(section: Measured) -> Iterator[str]:
    slow = section.psnr_db(_SLOWEST, _PAPER)
    fast = [psnr for rule in section.rules[1:] if (psnr := section.psnr_db(_FASTEST, rule)) is not None]
    if slow is not None and fast:
        closer = "closer to" if max(fast) > slow else "further from"
        yield (
            f"{_FASTEST}, the fastest, is {closer} the original ({max(fast):.1f} dB) than the paper's rule "
            f"at {_SLOWEST} ({slow:.1f} dB)."
        )


def where_it_does_not_help(section: Measured) -> str:
    """One sentence: the rows in which a rule is below the paper's, in the mean or in the worst tenth."""
    below = []
    for rule in section.rules:
        for configuration in section.configurations if rule != _PAPER else ():
            pairs = {
                "": (section.psnr_db(configuration, rule), section.psnr_db(configuration, _PAPER)),
                "worst tenth ": (
                    section.worst_tenth_db(configuration, rule),
                    section.worst_tenth_db(configuration, _PAPER),
                ),
            }
            below += [
                f"{configuration} {rule} ({what}{own - paper:+.1f} dB)"
                for what, (own, paper) in pairs.items()
                if own is not None and paper is not None and own < paper
            ]
    if below:
        return f"Does not help, against the paper's rule: {'; '.join(below)}."
    return "Nothing here is below the paper's rule, neither the mean nor the worst tenth."


def settings_tables(models: Mapping[str, Mapping[str, Measured]]) -> str:
    """Every other setting with the warm-up of one step."""
    parts = []
    for model, sections in models.items():
        for name, section in sections.items():
            if name in (MAIN, AUTO_WARMUP, WAYS) or name.startswith(REFRESH):
                continue
            parts += [f"**{_title(model, section)}**", ""]
            failed = section.values["failed"]
            parts += [f"Could not be run: {failed}"] if failed else _setting_table(section)
            parts.append("")
    return "\n".join(parts)


def _setting_table(section: Measured) -> Iterator[str]:
    yield f"| stages x stride | {' | '.join(section.rules)} |"
    yield "|" + "---|" * (len(section.rules) + 1)
    for configuration in section.configurations:
        cells = [cell(section, configuration, rule) for rule in section.rules]
        yield f"| {configuration} | {' | '.join(cells)} |"
    yield ""
    yield f"{_note(section)} {where_it_does_not_help(section)}"
    for each in section.values["skipped"]:
        yield f"Refused: {each['name']}: {each['reason']}"


def auto_tables(models: Mapping[str, Mapping[str, Measured]]) -> str:
    """Automatic warm-up beside one step."""
    parts = []
    for model, sections in models.items():
        if AUTO_WARMUP not in sections:
            continue
        section, fixed = sections[AUTO_WARMUP], sections.get(MAIN)
        parts += [
            f"**{_title(model, section)}**",
            "",
            '| stages x stride | reads | w=1 | w="auto" | steps in order | speed-up, w=1 | w="auto" |',
            "|---|---|---|---|---|---|---|",
        ]
        for (configuration, rule), row in section.rows.items():
            cells = [
                configuration,
                rule,
                "" if fixed is None else cell(fixed, configuration, rule),
                cell(section, configuration, rule),
                _steps(row),
                "" if fixed is None else _speedup(fixed, configuration, rule),
                _speedup(section, configuration, rule),
            ]
            parts.append(f"| {' | '.join(cells)} |")
        parts += ["", _note(section), ""]
    return "\n".join(parts)


def refresh_tables(models: Mapping[str, Mapping[str, Measured]]) -> str:
    """Guidance refreshed: a column for every number of steps and guidance scale."""
    parts = []
    for model, sections in models.items():
        columns = [section for name, section in sections.items() if name.startswith(REFRESH)]
        if not columns:
            continue
        heads = ["stages x stride", "reads", *(section.values["title"] for section in columns)]
        parts += [f"**{_title(model, columns[0], 'guidance refreshed')}**", "", f"| {' | '.join(heads)} |"]
        parts.append("|" + "---|" * len(heads))
        for configuration, rule in columns[0].rows:
            cells = [configuration, rule, *(cell(section, configuration, rule) for section in columns)]
            parts.append(f"| {' | '.join(cells)} |")
        values = columns[0].values
        num_captions = values["settings"]["generation"]["num_captions"]
        parts += [
            "",
            f"PSNR in dB against in order: mean of {num_captions} held-out captions, in brackets that of the "
            f"worst tenth; {values['scheduler']}, {values['dtype']}.",
            "",
        ]
    return "\n".join(parts)


def _decibels(value: float) -> str:
    return "equal" if math.isinf(value) else f"{value:.1f}"


def _speedup(section: Measured, configuration: str, rule: str) -> str:
    row = section.rows.get((configuration, rule))
    speedup = None if row is None else row["summary"]["speedup"]
    return "" if speedup is None else f"{speedup:.2f}x"


def _steps(row: Mapping[str, Any]) -> str:
    counts = sorted({len(steps) for steps in row["steps_in_order"]})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _title(model: str, section: Measured, title: str = "") -> str:
    values = section.values
    pipeline = f" ({values['pipeline']})" if values["ways"] else ""
    return f"{model}{pipeline}, {title or values['title']}"


def _note(section: Measured) -> str:
    values = section.values
    generation = values["settings"]["generation"]
    packages = values["environment"]["packages"]
    splits = " and ".join(sorted({row["split"] for row in section.rows.values()}))
    return (
        f"PSNR in dB against in order: mean of {generation['num_captions']} held-out captions, in brackets "
        f"that of the worst tenth; {generation['steps']} steps, {values['scheduler']}, guidance "
        f"{values['guidance_scale']:g}, {values['dtype']}, split: {splits}; torch {packages['torch']}, "
        f"diffusers {packages['diffusers']}."
    )


def write_plots(models: Mapping[str, Mapping[str, Measured]], folder: Path) -> list[tuple[str, Path]]:
    """(what it shows, file) of each."""
    from asyncdiff.bench.quality.plots import Point, error_plot, speed_plot

    written = []
    for model, sections in models.items():
        if MAIN not in sections:
            continue
        points = [
            Point(
                configuration=configuration,
                line=rule,
                psnr_mean_db=sections[MAIN].psnr_db(configuration, rule) or math.inf,
                speedup=row["summary"]["speedup"],
                prediction_errors=tuple(row["prediction_errors"]),
            )
            for (configuration, rule), row in sections[MAIN].rows.items()
        ]
        for name, what, draw in (
            ("speed", "fidelity against simulated speed, 50 steps", speed_plot),
            ("steps", "relative error of the prediction, by step", error_plot),
        ):
            path = folder / f"fidelity-{model}-{name}.png"
            draw(points).savefig(path, dpi=_DOTS_PER_INCH, metadata={"Software": None})
            written.append((f"{model}: {what}", path))
    return written


def fill(page: str, content: Mapping[str, Any], pictures: Sequence[tuple[str, str]]) -> str:
    """The page with everything filled in; `pictures`: (what it shows, address)."""
    models = read_sections(content)
    source = f"Made by `{content['command']}`."
    tables = {
        "gain": gain_tables(models),
        "settings": settings_tables(models),
        "auto": auto_tables(models),
        "refresh": refresh_tables(models),
        "plots": "\n\n".join(f"![{what}]({address})" for what, address in pictures),
    }
    for name in MARKERS:
        page = replace_measured(page, f"{tables[name]}\n{source}" if name == "gain" else tables[name], name)
    return page


def render(
    page: Annotated[Path, typer.Argument(help="A page in Markdown with the markers.", dir_okay=False)],
    measured: Annotated[
        Path, typer.Option("--figures", metavar="FILE", help="What the other command wrote.")
    ] = Path("docs/benchmarks/fidelity.json"),
    images: Annotated[Path, typer.Option("--images", metavar="FOLDER", help="Where the plots go.")] = Path(
        "docs/images"
    ),
) -> None:
    """Fill the tables of the page and draw its plots."""
    for path in (page, measured):
        if not path.is_file():
            raise ConfigurationError(f"{path}: is no file.")
    if not images.is_dir():
        raise ConfigurationError(f"--images {images}: is no folder.")
    content = figures.read(measured)
    drawn = write_plots(read_sections(content), images)
    pictures = [(what, Path(os.path.relpath(path, page.parent)).as_posix()) for what, path in drawn]
    try:
        filled = fill(page.read_text(encoding="utf-8"), content, pictures)
    except ValueError as error:
        raise ConfigurationError(f"{page}: {error}") from error
    page.write_text(filled, encoding="utf-8")


if __name__ == "__main__":
    command.run_command(render)
