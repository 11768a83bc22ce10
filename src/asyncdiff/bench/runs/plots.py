"""The result as figures: speed-ups, what each device does in a stretch of the steady state, memory."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from asyncdiff.bench.runs.figures import BenchResult, ConfigurationFigures, Spread
from asyncdiff.simulation import COMPUTE, TRANSFER, WAIT

_WIDTH = 9.0  # inches
_STEP, _RUN, _OTHERS = "#2f6db3", "#8db8e2", "#b9b9b9"
_IDEAL, _MACHINE = "#c0392b", "#222222"
_COLOURS = {COMPUTE: (_STEP, "#5b93cf"), WAIT: ("#f2c14e",) * 2, TRANSFER: ("#c0392b",) * 2}
_MB = 1e6
# Texts as text instead of outlines: a tenth of the size.
STYLE = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}


def plots(result: BenchResult) -> dict[str, Figure]:
    """The figures by what they show."""
    return {
        "Speed-up against in order": speedup_plot(result),
        "What each device does, steady state": timeline_plot(result),
        "Memory": memory_plot(result),
    }


def data_uri(figure: Figure) -> str:
    """As the address of an SVG picture that holds everything itself."""
    written = io.BytesIO()
    with rc_context(STYLE):
        figure.savefig(written, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return "data:image/svg+xml;base64," + base64.b64encode(written.getvalue()).decode("ascii")


@dataclass(frozen=True)
class _Bar:
    """One bar; `ideal` and `machine` are marks on it, None where there is no such limit."""

    label: str
    speedup: Spread
    colour: str
    ideal: float | None = None
    machine: float | None = None


def speedup_plot(result: BenchResult) -> Figure:
    """One bar for steps and one for whole runs of each configuration, with what is possible marked on it."""
    bars = list(_bars(result))
    with rc_context(STYLE):
        figure, (axes,) = stacked_axes(heights=[0.32 * len(bars) + 0.9])
        places = range(len(bars))
        medians = [bar.speedup.median for bar in bars]
        errors = (
            [bar.speedup.median - bar.speedup.lowest for bar in bars],
            [bar.speedup.highest - bar.speedup.median for bar in bars],
        )
        axes.barh(
            places, medians, xerr=errors, color=[bar.colour for bar in bars], height=0.7, ecolor="#555555"
        )
        axes.set_yticks(places, [bar.label for bar in bars])
        axes.invert_yaxis()
        for marker, colour, name, label in (
            ("D", _IDEAL, "ideal", "ideal of the partition"),
            ("|", _MACHINE, "machine", "what this machine allows"),
        ):
            marked = [(getattr(bar, name), place) for place, bar in zip(places, bars, strict=True)]
            xs, ys = zip(*[(x, y) for x, y in marked if x is not None], strict=True)
            size, width = (5, 1) if marker == "D" else (17, 2.5)
            axes.plot(
                xs, ys, marker, color=colour, markersize=size, markeredgewidth=width, label=label, zorder=4
            )
        axes.axvline(1.0, color="#555555", linewidth=0.8, linestyle=":")
        limits = [x for bar in bars for x in (bar.speedup.highest, bar.ideal, bar.machine) if x is not None]
        axes.set_xlim(0, 1.16 * max(limits))
        for place, bar in zip(places, bars, strict=True):
            right = {"x": 1.0, "ha": "right", "transform": axes.get_yaxis_transform()}
            axes.text(y=place, s=f"{bar.speedup.median:.2f}", va="center", weight="bold", **right)
        axes.set_xlabel("times as fast as in order (bar: median; line: lowest to highest run)")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    return figure


def _bars(result: BenchResult) -> list[_Bar]:
    bars = []
    for each in result.configurations:
        step = (each.ideal_step_speedup, each.machine_step_speedup)
        run = (each.ideal_run_speedup, each.machine_run_speedup)
        bars.append(_Bar(f"{each.name} steady step", each.step_speedup, _STEP, *step))
        bars.append(_Bar(f"{each.name} whole run", each.run_speedup, _RUN, *run))
    for limit in result.limits:
        if limit.all_threads is not None:
            label = f"one process, cores of {limit.devices}: step"
            bars.append(_Bar(label, limit.all_threads, _OTHERS))
    for other in result.comparisons:
        if other.run_speedup is not None:
            bars.append(_Bar(f"{other.name}: whole run", other.run_speedup, _OTHERS))
    return bars


def timeline_plot(result: BenchResult) -> Figure:
    """Per configuration one row per device, from the moment that the driver begins a round."""
    figures = result.configurations
    with rc_context(STYLE):
        figure, rows = stacked_axes(heights=[0.4 * len(each.devices) + 0.75 for each in figures])
        for axes, each in zip(rows, figures, strict=True):
            _draw_timeline(axes, each)
        rows[-1].set_xlabel("milliseconds")
        handles = [Figure().add_subplot().barh(0, 0, color=colours[0]) for colours in _COLOURS.values()]
        labels = ["compute (one step after the other in two shades)", "waiting for states", "sending"]
        rows[0].legend(
            handles,
            labels,
            loc="lower center",
            bbox_to_anchor=(0.5, 1.15),
            ncols=3,
            frameon=False,
            fontsize=9,
        )
    return figure


def _draw_timeline(axes: Axes, each: ConfigurationFigures) -> None:
    for rank in range(len(each.devices)):
        computed = 0
        for span in sorted(each.timeline, key=lambda span: (span.category != COMPUTE, span.start_ms)):
            if span.rank != rank:
                continue
            shade = computed % 2 if span.category == COMPUTE else 0
            computed += span.category == COMPUTE
            axes.barh(
                rank,
                span.end_ms - span.start_ms,
                left=span.start_ms,
                color=_COLOURS[span.category][shade],
                height=0.8 if span.category == COMPUTE else 0.5,
            )
    axes.set_yticks(
        range(len(each.devices)), [f"{rank}: {device.device}" for rank, device in enumerate(each.devices)]
    )
    axes.set_ylim(len(each.devices) - 0.5, -0.5)
    axes.set_xlim(0, max(span.end_ms for span in each.timeline))
    axes.set_title(
        f"{each.name}: stages {each.num_stages}, stride {each.stride}",
        fontsize=10,
        loc="left",
    )


def memory_plot(result: BenchResult) -> Figure:
    """Per process its resident memory (and device memory at its peak), and the denoiser's weights in it."""
    whole = result.in_order
    rows: list[tuple[str, int, int, int]] = [
        ("in order", whole.weight_bytes, whole.resident_bytes, whole.device_peak_bytes)
    ]
    for each in result.configurations:
        for rank, device in enumerate(each.devices):
            label = f"{each.name}, {rank}: {device.device}"
            rows.append((label, device.weight_bytes, device.resident_bytes, device.device_peak_bytes))
    has_peaks = any(peak for *_, peak in rows)
    with rc_context(STYLE):
        figure, (axes,) = stacked_axes(heights=[0.36 * len(rows) + 0.9])
        places = list(range(len(rows)))
        _bar_row(axes, places, [row[2] for row in rows], "#d5d5d5", 0.8, "process, resident")
        if has_peaks:
            _bar_row(axes, places, [row[3] for row in rows], _RUN, 0.55, "on the GPU, at its peak")
        _bar_row(axes, places, [row[1] for row in rows], _STEP, 0.3, "the denoiser's weights")
        axes.set_yticks(places, [row[0] for row in rows])
        axes.invert_yaxis()
        axes.set_xlabel("MB")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    return figure


def _bar_row(
    axes: Axes, places: Sequence[int], sizes: Sequence[int], colour: str, height: float, label: str
) -> None:
    axes.barh(places, [size / _MB for size in sizes], color=colour, height=height, label=label)


def stacked_axes(heights: Sequence[float]) -> tuple[Figure, list[Any]]:
    """Axes one below the other, in inches."""
    figure = Figure(figsize=(_WIDTH, sum(heights) + 0.5), layout="constrained")
    axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=list(heights))
    found = [row[0] for row in axes]
    for each in found:
        each.spines[["top", "right"]].set_visible(False)
    return figure, found
