"""The page: where each panel stands, its frame and title, and what is inside, drawn by its type."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from gradiometer_dashboards.drawing import charts, tables
from gradiometer_dashboards.drawing.shades import INK, LINES, PAPER, QUIET, WINDOW
from gradiometer_dashboards.drawing.tables import clipped, size_of
from gradiometer_dashboards.evaluation import Answer, QueryError, View

__all__ = ["draw"]

Json = dict[str, Any]

DPI = 100
GAP, UNIT, HEAD = 8, 38, 44
"""Pixels between panels, of a grid row with its gap, and of the page's own heading."""
TITLE = 28
"""Pixels that a panel's title takes."""

PLAIN = {"text.parse_math": False, "text.usetex": False}
"""Names of layers and queries may have dollars, and are no formulas."""

Draw = Callable[[Axes, Json, list[Answer], View], None]
DRAWN: dict[str, Draw] = {
    "stat": charts.stat, "timeseries": charts.lines, "heatmap": charts.heatmap, "state-timeline": charts.bands,
    "bargauge": charts.gauge, "table": tables.table,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a panel stands, in pixels from the top left corner."""

    panel: Json
    left: float
    top: float
    width: float
    height: float


def draw(view: View, path: Path, *, unfold: bool = True, rows: int | None = None) -> None:
    """Draw what ``view`` shows to ``path``, a PNG; ``rows`` cuts it below so many rows of the grid.

    ``unfold`` opens rows that the dashboard keeps shut. A panel whose query fails says so in its place. Raises
    ValueError for a kind of panel that is not known here.
    """
    with rc_context(PLAIN):
        _draw(view, path, unfold=unfold, rows=rows)


def _draw(view: View, path: Path, *, unfold: bool, rows: int | None) -> None:
    places = list(_places(view, unfold=unfold))
    shown = [place for place in places if not rows or place.top + place.height <= HEAD + rows * UNIT]
    while shown and shown[-1].panel["type"] == "row":  # whose panels were cut off
        shown.pop()
    height = max(place.top + place.height for place in shown)
    figure = Figure(figsize=(view.width / DPI, (height + GAP) / DPI), dpi=DPI, facecolor=WINDOW)
    page = _axes(figure, 0, 0, view.width, height + GAP)
    page.text(GAP, 14, view.dashboard["title"], size=15, weight="bold", color=INK, va="top")
    page.text(view.width - GAP, 18, _headline(view), size=9, color=QUIET, va="top", ha="right")
    for place in shown:
        _panel(figure, page, place, view)
    figure.savefig(path, dpi=DPI)


def _places(view: View, *, unfold: bool) -> Iterator[Place]:
    shift = 0
    for panel in view.dashboard["panels"]:
        yield _place(panel, panel["gridPos"]["y"] + shift, view.width)
        inside = panel.get("panels") or ()
        if panel["type"] == "row" and inside and unfold:
            first = min(each["gridPos"]["y"] for each in inside)
            base = panel["gridPos"]["y"] + shift + 1
            for each in inside:
                yield _place(each, base + each["gridPos"]["y"] - first, view.width)
            shift += max(each["gridPos"]["y"] - first + each["gridPos"]["h"] for each in inside)


def _place(panel: Json, row: int, width: int) -> Place:
    grid, column = panel["gridPos"], (width - GAP) / 24
    across = 24 if panel["type"] == "row" else grid["w"]
    return Place(
        panel=panel,
        left=GAP + grid["x"] * column,
        top=HEAD + row * UNIT,
        width=across * column - GAP,
        height=grid["h"] * UNIT - GAP,
    )


def _headline(view: View) -> str:
    def clock(moment: float) -> str:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(moment))

    hidden = {each["name"] for each in view.dashboard["templating"]["list"] if each.get("hide")}
    chosen = [name for name in ("run_id", "rank", "layer") if name in view.variables and name not in hidden]
    values = [f"{name}: {', '.join(view.selected(name)).replace('$__all', 'All')}" for name in chosen]
    return "     ".join([*values, f"{clock(view.start)} to {clock(view.end)[11:]} UTC"])


def _panel(figure: Figure, page: Axes, place: Place, view: View) -> None:
    panel, left, top, width, height = place.panel, place.left, place.top, place.width, place.height
    if panel["type"] == "row":
        page.text(left, top + height / 2, panel["title"], size=11, weight="bold", color=INK, va="center")
        return
    page.add_patch(
        FancyBboxPatch((left, top), width, height, boxstyle="round,pad=0,rounding_size=3", fc=PAPER, ec=LINES)
    )
    title = clipped(panel["title"], 0.85 * width)
    page.text(left + 8, top + 14, title, size=9.5, weight="bold", color=INK, va="center")
    inside = _axes(figure, left, top + TITLE, width, height - TITLE)
    if panel["type"] == "alertlist":
        _note(inside, "Grafana's own list: not drawn here")
        return
    if panel["type"] not in DRAWN:
        raise ValueError(f"panel {panel['title']!r} is a {panel['type']}, which is not drawn")
    try:
        answers = view.answers(panel)
    except QueryError as error:
        inside.text(8, 20, str(error)[:200], size=8, color="red", wrap=True)
        return
    if any(answer.series for answer in answers):
        DRAWN[panel["type"]](inside, panel, answers, view)
    else:
        _note(inside, panel["fieldConfig"]["defaults"].get("noValue") or "No data")


def _note(axes: Axes, text: str) -> None:
    wide, high = size_of(axes)
    axes.text(wide / 2, high / 2, text, size=10, color=QUIET, ha="center", va="center")


def _axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Make axes without marks, in pixels from their top left corner."""
    wide, high = figure.get_size_inches() * DPI
    axes = figure.add_axes((left / wide, 1 - (top + height) / high, width / wide, height / high))
    axes.set_axis_off()
    axes.set(xlim=(0, width), ylim=(height, 0))
    return axes
