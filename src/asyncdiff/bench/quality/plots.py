"""The result as figures: fidelity against speed, and where in a run the error arises."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from asyncdiff.bench.quality.results import QualityResult, WayQuality
from asyncdiff.bench.runs.plots import STYLE, stacked_axes

_COLOURS = ("#c0392b", "#2f6db3", "#3a9d5d", "#8e5bb5", "#e08a1e", "#5b6b7b", "#1aa6a6", "#b5536c")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


@dataclass(frozen=True)
class Point:
    """What is drawn of one way. `line`: its rule, and its warm-up where there are several."""

    configuration: str
    line: str
    psnr_mean_db: float
    speedup: float | None
    prediction_errors: tuple[float, ...]


def plots(result: QualityResult) -> dict[str, Figure]:
    """The figures by what they show."""
    points = _points(result.ways)
    found = {}
    if any(_is_on_speed_plot(point) for point in points):
        found["Fidelity against speed"] = speed_plot(points)
    if any(point.prediction_errors for point in points):
        found["Error of the prediction, by step"] = error_plot(points)
    return found


def _points(ways: Sequence[WayQuality]) -> list[Point]:
    has_several = len({each.way.warmup_steps for each in ways}) > 1
    return [
        Point(
            configuration=str(each.way.configuration),
            line=f"{each.way.rule}, w={each.way.warmup_steps}" if has_several else each.way.rule,
            psnr_mean_db=each.psnr_mean_db,
            speedup=None if each.speed is None else each.speed.speedup,
            prediction_errors=each.prediction_errors,
        )
        for each in ways
    ]


def _is_on_speed_plot(point: Point) -> bool:
    return point.speedup is not None and math.isfinite(point.psnr_mean_db)


def speed_plot(points: Iterable[Point]) -> Figure:
    """PSNR over speed-up, a point per configuration; pictures without any difference are left out."""
    shown = [point for point in points if _is_on_speed_plot(point)]
    with rc_context(STYLE):
        figure, (axes,) = stacked_axes(heights=[4.2])
        for line, colour, marker in _styles(shown):
            own = sorted(
                (point.speedup or 0.0, point.psnr_mean_db, point.configuration)
                for point in shown
                if point.line == line
            )
            axes.plot(
                [speedup for speedup, _, _ in own],
                [psnr for _, psnr, _ in own],
                color=colour,
                marker=marker,
                linewidth=1.2,
                label=line,
            )
            for speedup, psnr, name in own:
                axes.annotate(name, (speedup, psnr), (4, 4), textcoords="offset points", fontsize=8)
        axes.set_xlabel("times as fast as in order")
        axes.set_ylabel("PSNR against in order, dB")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=9)
    return figure


def error_plot(points: Sequence[Point]) -> Figure:
    """Relative error of each step's prediction, one panel per configuration. Its axis is logarithmic: steps
    without error are gaps."""
    configurations = list(dict.fromkeys(point.configuration for point in points))
    with rc_context(STYLE):
        figure, panels = stacked_axes(heights=[2.3] * len(configurations))
        for axes, configuration in zip(panels, configurations, strict=True):
            _draw_errors(axes, points, configuration)
            axes.set_title(f"stages x stride {configuration}", fontsize=10, loc="left")
        panels[-1].set_xlabel("step")
        panels[0].legend(frameon=False, fontsize=9, ncols=2)
    return figure


def _draw_errors(axes: Axes, points: Sequence[Point], configuration: str) -> None:
    colours = {line: colour for line, colour, _ in _styles(points)}
    for point in points:
        if point.configuration == configuration:
            errors = [error if error > 0 else math.nan for error in point.prediction_errors]
            colour = colours[point.line]
            axes.plot(range(len(errors)), errors, color=colour, linewidth=1.3, label=point.line)
    axes.set_yscale("log")
    axes.set_ylabel("relative L2")
    axes.grid(alpha=0.25)


def _styles(points: Sequence[Point]) -> list[tuple[str, str, str]]:
    """(line, colour, marker), the same in every figure of the same lines."""
    lines = dict.fromkeys(point.line for point in points)
    return list(zip(lines, itertools.cycle(_COLOURS), itertools.cycle(_MARKERS), strict=False))
