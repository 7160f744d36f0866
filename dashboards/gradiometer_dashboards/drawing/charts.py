"""Draw the panels that are no tables: numbers, lines, heatmaps, bands and gauges."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import dates
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from gradiometer_dashboards.drawing.looks import Curve, curves, reduce, setting, worded
from gradiometer_dashboards.drawing.shades import INK, LINES, QUIET
from gradiometer_dashboards.drawing.tables import clipped, size_of
from gradiometer_dashboards.drawing.units import spell
from gradiometer_dashboards.evaluation import Answer, View

__all__ = ["bands", "gauge", "heatmap", "lines", "stat"]

Json = dict[str, Any]
Grid = npt.NDArray[np.float64]

LEGEND = 0.4
"""Share of a graph's width that a legend on the right takes at most."""
LEGEND_PIXELS = 330.0
LEGEND_LINE = 17
LINE = 15
"""Pixels that the name of a row takes."""
COLUMN = 52
"""Pixels of a legend's column of numbers."""


def stat(axes: Axes, panel: Json, answers: list[Answer], _: View) -> None:
    """Write the newest values side by side, each in the colour of its threshold."""
    shown = curves(panel, answers)
    wide, high = size_of(axes)
    named = panel["options"].get("textMode") in ("name", "value_and_name") or len(shown) > 1
    for place, curve in enumerate(shown):
        text, colour = worded(reduce(curve.series.values, panel["options"]["reduceOptions"]["calcs"][0]), curve.own)
        across = (place + 0.5) * wide / len(shown)
        if panel["options"].get("textMode") == "name":
            text, label = curve.name, ""
        else:
            label = curve.name if named else ""
        background = panel["options"].get("colorMode") == "background" and colour != INK
        if background:
            left = place * wide / len(shown)
            axes.add_patch(Rectangle((left, 0), wide / len(shown), high - 2, fc=colour, ec="none"))
        size = min(24.0, high / 3, 1.2 * wide / len(shown) / max(3, len(text)))
        axes.text(
            across, high * 0.46, text, size=size, color="white" if background else colour, ha="center", va="center"
        )
        label = clipped(label, wide / len(shown))
        axes.text(across, high * 0.84, label, size=8, color="white" if background else QUIET, ha="center", va="center")


def lines(axes: Axes, panel: Json, answers: list[Answer], view: View) -> None:
    """Draw series over time as lines or bars, with the legend that the panel states."""
    shown = [curve for curve in curves(panel, answers) if curve.series.times]
    plot = _plot(axes, view, legend=_legend(axes, panel, shown))
    step = view.interval(panel)
    defaults = setting(panel, "")
    logarithmic = (defaults.get("custom.scaleDistribution") or {}).get("type") == "log"
    for curve in shown:
        times, values = _gapped(curve, step, logarithmic=logarithmic)
        if curve.own.get("custom.drawStyle") == "bars":
            plot.bar(times, values, width=step / 86400, color=curve.colour, align="edge", alpha=0.85)
        else:
            dashed = (curve.own.get("custom.lineStyle") or {}).get("fill") == "dash"
            width = max(1.1, float(curve.own.get("custom.lineWidth", 1)))
            plot.plot(times, values, color=curve.colour, lw=width, ls="--" if dashed else "-", marker=_marker(values))
    if logarithmic:
        plot.set_yscale("log")
        plot.yaxis.set_major_locator(LogLocator(numticks=7))
        plot.minorticks_off()
    else:
        plot.yaxis.set_major_locator(MaxNLocator(5))
    nothing = not logarithmic and not any(any(curve.series.values) for curve in shown)
    plot.set_ylim(defaults.get("min"), defaults.get("max", 1.0 if nothing else None))
    plot.yaxis.set_major_formatter(FuncFormatter(lambda value, _: spell(value, defaults.get("unit", "none"))))


def heatmap(axes: Axes, panel: Json, answers: list[Answer], view: View) -> None:
    """Draw a histogram's buckets, of which each holds those below, or one row a series, over time."""
    (answer,) = answers
    buckets = panel["targets"][0].get("format") == "heatmap"
    series = sorted(answer.series, key=lambda each: float(each.labels["le"])) if buckets else answer.series
    times = sorted({moment for each in series for moment in each.times})
    cells = np.full((len(series), len(times)), np.nan)
    place = {moment: index for index, moment in enumerate(times)}
    for row, each in enumerate(series):
        cells[row, [place[moment] for moment in each.times]] = each.values
    if buckets:
        cells = np.diff(np.nan_to_num(cells), axis=0, prepend=0.0)
        cells[cells <= 1e-9] = np.nan
    plot = _plot(axes, view, legend=90.0, left=60.0 if buckets else 180.0)
    edges = [_moment(moment) for moment in [*times, times[-1] + view.interval(panel)]]
    finite: Grid = np.where(np.isfinite(cells), cells, np.nan)
    mesh = plot.pcolormesh(edges, np.arange(len(series) + 1), finite, cmap="turbo", shading="flat")
    _scale(axes, panel, mesh)
    unit = ((panel["options"].get("yAxis") or {}).get("unit")) or "none"
    names = [spell(float(each.labels["le"]), unit) if buckets else each.legend for each in series]
    every = max(1, math.ceil(len(names) * LINE / size_of(axes)[1]))
    plot.set_yticks(
        np.arange(0, len(names), every) + (1.0 if buckets else 0.5), [clipped(n, 165) for n in names[::every]]
    )
    plot.grid(visible=False)


def bands(axes: Axes, panel: Json, answers: list[Answer], view: View) -> None:
    """Draw a band a series, whose colour tells its value."""
    shown = [curve for answer in answers for curve in curves(panel, [answer])]
    plot, step = _plot(axes, view, legend=8.0, left=180.0), view.interval(panel)
    for row, curve in enumerate(shown):
        for moment, value in zip(curve.series.times, curve.series.values, strict=True):
            _, colour = worded(value, curve.own)
            plot.barh(row, step / 86400, left=_moment(moment), height=0.8, color=colour, align="center")
    plot.set_yticks(range(len(shown)), [clipped(curve.name, 165) for curve in shown])
    plot.set_ylim(len(shown) - 0.5, -0.5)
    plot.grid(visible=False)


def gauge(axes: Axes, panel: Json, answers: list[Answer], _: View) -> None:
    """Draw a bar a series, as long as its value is large."""
    shown = curves(panel, answers)
    wide, high = size_of(axes)
    values = [reduce(curve.series.values, "lastNotNull") for curve in shown]
    top = setting(panel, "").get("max") or max((v for v in values if math.isfinite(v)), default=1.0) or 1.0
    line = min(30.0, high / max(1, len(shown)))
    for place, (curve, value) in enumerate(zip(shown, values, strict=True)):
        text, colour = worded(value, curve.own)
        middle, length = (
            (place + 0.5) * line,
            (wide - 300) * min(1.0, max(0.0, value / top)) if math.isfinite(value) else 0,
        )
        axes.text(8, middle, clipped(curve.name, 190), size=8, color=INK, va="center")
        axes.add_patch(Rectangle((210, middle - line * 0.35), length, line * 0.7, fc=colour, ec="none"))
        axes.text(wide - 8, middle, text, size=9, color=colour, va="center", ha="right")


def _plot(axes: Axes, view: View, *, legend: float, left: float = 56.0) -> Axes:
    """Make axes of time inside a panel, with room for the legend on the right, in pixels."""
    wide, high = size_of(axes)
    plot = axes.inset_axes((left / wide, 26 / high, (wide - left - legend - 10) / wide, (high - 38) / high))
    plot.set_xlim(_moment(view.start), _moment(view.end))
    locator = dates.AutoDateLocator(minticks=2, maxticks=max(2, int((wide - left - legend) / 75)))
    plot.xaxis.set_major_locator(locator)
    plot.xaxis.set_major_formatter(dates.DateFormatter("%H:%M:%S" if view.end - view.start < 900 else "%H:%M"))
    plot.tick_params(labelsize=7.5, length=0, colors=QUIET)
    plot.grid(visible=True, color=LINES, lw=0.6)
    plot.set_axisbelow(True)
    for spine in plot.spines.values():
        spine.set_visible(False)
    return plot


def _legend(axes: Axes, panel: Json, shown: list[Curve]) -> float:
    """Write the legend as a table on the right, and return the pixels it took."""
    options = panel["options"].get("legend") or {}
    if not options.get("showLegend") or not shown:
        return 0.0
    wide, high = size_of(axes)
    width = min(LEGEND_PIXELS, wide * LEGEND)
    headers = {"lastNotNull": "Last", "max": "Max", "min": "Min", "mean": "Mean", "sum": "Sum"}
    calculations = [each for each in options.get("calcs") or () if each in headers]
    for place, each in enumerate(reversed(calculations)):
        axes.text(wide - 10 - COLUMN * place, 6, headers[each], size=7.5, color=QUIET, ha="right", va="center")
    room = width - COLUMN * len(calculations) - 24
    for row, curve in enumerate(shown[: int((high - 22) // LEGEND_LINE)]):
        middle = 22 + row * LEGEND_LINE
        axes.add_patch(Rectangle((wide - width, middle - 2), 12, 4, fc=curve.colour, ec="none"))
        axes.text(wide - width + 17, middle, clipped(curve.name, room), size=8, color=INK, va="center")
        for place, each in enumerate(reversed(calculations)):
            text = spell(reduce(curve.series.values, each), curve.own.get("unit", "none"), curve.own.get("decimals"))
            axes.text(wide - 10 - COLUMN * place, middle, text, size=8, color=INK, ha="right", va="center")
    return width


def _scale(axes: Axes, panel: Json, mesh: Any) -> None:
    """Write what the colours of a heatmap mean."""
    unit = ((panel["options"].get("cellValues") or {}).get("unit")) or "none"
    strip = axes.inset_axes((1 - 72 / size_of(axes)[0], 0.12, 10 / size_of(axes)[0], 0.76))
    bar = axes.figure.colorbar(mesh, cax=strip)
    bar.ax.tick_params(labelsize=7.5, length=0, colors=QUIET)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: spell(value, unit)))
    bar.outline.set_visible(False)


def _gapped(curve: Curve, step: float, *, logarithmic: bool) -> tuple[list[float], list[float]]:
    """Break a line where points are missing, or have no place on the axis."""
    times: list[float] = []
    values: list[float] = []
    before = math.inf
    for moment, value in zip(curve.series.times, curve.series.values, strict=True):
        if moment - before > 1.5 * step:
            times.append(_moment(before + step / 2))
            values.append(math.nan)
        times.append(_moment(moment))
        values.append(value if math.isfinite(value) and (value > 0 or not logarithmic) else math.nan)
        before = moment
    return times, values


def _marker(values: list[float]) -> str:
    """Draw a lone point as a dot."""
    return "." if sum(math.isfinite(value) for value in values) < 3 else ""


def _moment(seconds: float) -> float:
    """Return Unix time as matplotlib counts it: in days."""
    return seconds / 86400
