"""Grafana's named colours as matplotlib takes them, and the colour that a value has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

__all__ = ["INK", "LINES", "PAPER", "QUIET", "SERIES", "WINDOW", "judged", "shade", "shaded"]

Json = dict[str, Any]

WINDOW, PAPER, LINES, INK, QUIET = "#f4f5f5", "#ffffff", "#e1e3e6", "#24292e", "#6e7780"
HUES = {
    "red": "#e02f44", "orange": "#ff780a", "yellow": "#f2cc0c", "green": "#56a64b", "blue": "#3274d9",
    "purple": "#a352cc",    "text": INK, "white": "#ffffff", "gray": "#8e8e8e", "transparent": INK,
}  # fmt: skip
MIXED = {
    "super-light": ("#ffffff", 0.6),
    "light": ("#ffffff", 0.35),
    "semi-dark": ("#000000", 0.15),
    "dark": ("#000000", 0.3),
}
SERIES = ("green", "yellow", "blue", "orange", "red", "purple", "light-green", "light-blue", "dark-red", "dark-purple")
"""What series get that state no colour, in this order."""


def shade(name: str) -> str:
    """Return the hex of a colour of Grafana's, such as ``semi-dark-green``; hex is returned as it is."""
    if name.startswith("#"):
        return name
    mixture, _, hue = name.rpartition("-")
    base = HUES.get(hue, INK)
    if mixture not in MIXED:
        return base
    return _mixed(base, *MIXED[mixture])


def _mixed(base: str, other: str, share: float) -> str:
    parts = [
        round(int(base[place : place + 2], 16) * (1 - share) + int(other[place : place + 2], 16) * share)
        for place in (1, 3, 5)
    ]
    return "#" + "".join(f"{part:02x}" for part in parts)


def shaded(name: str, place: int) -> str:
    """Return the shade that the series at ``place`` has of those that share a colour: each lighter than the last."""
    return _mixed(shade(name), "#ffffff", 1 - 0.75 ** (place % 6))


def judged(value: float, steps: Sequence[Json]) -> str:
    """Return the name of the colour that thresholds give a value: that of the last one it reaches."""
    chosen = "text"
    for step in steps:
        if step.get("value") is None or (not math.isnan(value) and value >= step["value"]):
            chosen = step["color"]
    return chosen
