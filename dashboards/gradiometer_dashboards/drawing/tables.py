"""Draw tables: those of table panels, and the legends of graphs."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from gradiometer_dashboards.drawing.looks import setting, worded
from gradiometer_dashboards.drawing.rows import tabulate
from gradiometer_dashboards.drawing.shades import INK, LINES, QUIET
from gradiometer_dashboards.evaluation import Answer, View

__all__ = ["clipped", "size_of", "table"]

Json = dict[str, Any]

LINE = 26
"""Height of a row, in pixels."""
CHARACTER = 6.6
"""Width of a character, in pixels, at the size of a table."""


def clipped(text: str, pixels: float) -> str:
    """Cut a text that is wider than its place."""
    room = max(1, int(pixels / CHARACTER))
    return text if len(text) <= room else text[: room - 1] + "…"


def size_of(axes: Axes) -> tuple[float, float]:
    """Return width and height in pixels of axes that are scaled to them."""
    return axes.get_xlim()[1], axes.get_ylim()[0]


def table(axes: Axes, panel: Json, answers: list[Answer], _: View) -> None:
    """Draw as many rows of a table panel as there is room for, and say how many are below."""
    rows = tabulate(panel, answers)
    fullest = sorted(rows, key=len, reverse=True)  # a row that lacks a cell does not know where its column stands
    names = list(
        dict.fromkeys(name for row in fullest for name in row if not setting(panel, name).get("custom.hidden"))
    )
    wide, high = size_of(axes)
    lefts = _lefts(panel, names, rows, wide)
    for name, left, right in zip(names, lefts, lefts[1:], strict=False):
        axes.text(left + 6, 10, clipped(name, right - left), size=8, weight="bold", color="#3274d9", va="center")
    shown = int((high - 20) // LINE)
    for place, row in enumerate(rows[:shown]):
        top = 20 + place * LINE
        axes.plot((8, wide - 8), (top, top), color=LINES, lw=0.6)
        for name, left, right in zip(names, lefts, lefts[1:], strict=False):
            _cell(axes, row.get(name), setting(panel, name), (left, top, right - left))
    if len(rows) > shown:
        axes.text(wide - 8, 10, f"{len(rows) - shown} more below", size=7.5, color=QUIET, va="center", ha="right")


def _lefts(panel: Json, names: list[str], rows: list[Json], wide: float) -> list[float]:
    """Share the width by what is stated, else by the longest text."""
    wanted = []
    for name in names:
        texts = [name, *(str(row.get(name, ""))[:40] if isinstance(row.get(name), str) else "0.000 s" for row in rows)]
        stated = setting(panel, name).get("custom.width")
        wanted.append(float(stated or max(map(len, texts)) * CHARACTER + 14))
    scale = (wide - 16) / sum(wanted) if wanted else 1.0
    lefts = [8.0]
    for width in wanted:
        lefts.append(lefts[-1] + width * scale)
    return lefts


def _cell(axes: Axes, value: Any, own: Json, box: tuple[float, float, float]) -> None:
    left, top, width = box
    if value is None:
        return
    text, colour = (value, INK) if isinstance(value, str) else worded(value, own)
    filled = (own.get("custom.cellOptions") or {}).get("type") == "color-background" and colour != INK
    if filled:
        axes.add_patch(Rectangle((left + 1, top + 1), width - 2, LINE - 2, fc=colour, ec="none"))
    coloured = (own.get("custom.cellOptions") or {}).get("type") == "color-text"
    ink = "white" if filled else colour if coloured else INK
    axes.text(left + 6, top + LINE / 2, clipped(text, width - 8), size=8.5, color=ink, va="center")
