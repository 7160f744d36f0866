"""Small drawings in characters: numbers that fit, bars, sparklines and a chart on a logarithmic scale."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from rich.cells import cell_len, set_cell_size

from gradiometer_monitor.logs import escape

__all__ = ["ASCII", "UNICODE", "Glyphs", "age", "bar", "chart", "fit", "number", "peaks", "spark"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Glyphs:
    """The characters that the terminal can show."""

    levels: str
    """From the lowest to a full cell."""
    full: str
    dash: str
    more: str
    times: str
    mark: str


UNICODE = Glyphs(levels="▁▂▃▄▅▆▇█", full="█", dash="╌", more="…", times="×", mark="›")  # noqa: RUF001 - they are meant
ASCII = Glyphs(levels="_.-=+*#@", full="#", dash="-", more="~", times="x", mark=">")


def fit(text: str, width: int, glyphs: Glyphs, *, right: bool = False) -> str:
    """Cut or pad a text to ``width`` cells; what a terminal would obey is escaped, what it cannot show is replaced."""
    shown = escape(text)
    if glyphs is ASCII:
        shown = shown.encode("ascii", "replace").decode()
    if (size := cell_len(shown)) > width:
        return set_cell_size(shown, max(0, width - 1)) + glyphs.more[:width]
    return " " * (width - size) + shown if right else shown + " " * (width - size)


def number(value: float | None, digits: int = 3) -> str:
    """Write a number in few characters, below a million without an exponent of ten; ``-`` if it is not known."""
    if value is None:
        return "-"
    return f"{value:.0f}" if 10**digits <= abs(value) < 1e6 else f"{value:.{digits}g}"


def age(seconds: float) -> str:
    """Write a duration in four characters or less."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{int(seconds // size)}{unit}"
    return f"{max(0, int(seconds))}s"


def bar(share: float, width: int, glyphs: Glyphs) -> str:
    """Fill a part of ``width`` cells."""
    cells = 0 if math.isnan(share) else round(min(1.0, max(0.0, share)) * width)
    return glyphs.full * cells + " " * (width - cells)


def peaks(values: Floats, width: int) -> Floats:
    """Reduce to at most ``width`` values, each the largest of its part: a spike of one step stays. NaN for none."""
    if len(values) <= width:
        return values
    starts = np.linspace(0, len(values), width, endpoint=False).astype(int)
    found: Floats = np.fmax.reduceat(values, starts)
    return found


def _heights(values: Floats, levels: int, low: float, high: float) -> npt.NDArray[np.int64]:
    """Place values on a logarithmic scale, int64 from 0 to ``levels`` - 1; -1 for what is not finite or above 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(values)
    usable = np.isfinite(logs)
    span = max(high - low, 1e-9)
    places = np.clip((np.where(usable, logs, low) - low) / span * (levels - 1), 0, levels - 1)
    return np.where(usable, np.rint(places).astype(np.int64), -1)


def _bounds(values: Floats) -> tuple[float, float]:
    """Return the logarithms between which the values lie, at least a factor of two apart."""
    usable = values[np.isfinite(values) & (values > 0)]
    if not len(usable):
        return 0.0, 1.0
    low, high = float(np.log(usable.min())), float(np.log(usable.max()))
    missing = max(0.0, math.log(2.0) - (high - low)) / 2
    return low - missing, high + missing


def spark(values: Floats, width: int, glyphs: Glyphs) -> str:
    """Draw values in one line, on a logarithmic scale; ``!`` where one is NaN or infinite."""
    reduced = peaks(np.where(np.isfinite(values), values, np.inf), width)
    heights = _heights(reduced, len(glyphs.levels), *_bounds(reduced))
    cells = [
        "!" if np.isinf(value) else glyphs.levels[h] if h >= 0 else " "
        for value, h in zip(reduced, heights, strict=True)
    ]
    return "".join(cells).rjust(width)


def chart(values: Floats, width: int, height: int, glyphs: Glyphs, threshold: float | None) -> list[str]:
    """Draw values as columns on a logarithmic scale, with a scale at the left and a dashed line at the threshold."""
    plot = max(1, width - 10)
    reduced = peaks(np.where(np.isfinite(values), values, np.nan), plot)
    shown = reduced if threshold is None else np.append(reduced, threshold)
    low, high = _bounds(shown)
    steps = len(glyphs.levels)
    heights = _heights(reduced, height * steps, low, high)
    line = None if threshold is None else int(_heights(np.array([threshold]), height * steps, low, high)[0]) // steps
    lines = []
    for row in range(height - 1, -1, -1):
        middle = math.exp(low + (high - low) * (row + 0.5) / height)
        empty = glyphs.dash if row == line else " "
        cells = (_cell(int(place) - row * steps, steps, empty, glyphs) for place in heights)
        lines.append(f"{number(middle):>8}  " + "".join(cells).rjust(plot, empty))
    return lines


def _cell(above: int, steps: int, empty: str, glyphs: Glyphs) -> str:
    """Choose the character of a cell, whose column ends ``above`` steps above its lower edge."""
    return empty if above < 0 else glyphs.full if above >= steps else glyphs.levels[above]
