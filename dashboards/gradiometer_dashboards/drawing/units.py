"""Spell a number in one of Grafana's units, as short as a panel has room for."""

from __future__ import annotations

import math

__all__ = ["spell"]

POWERS = ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " K"))
BINARY = ((2**40, " TiB"), (2**30, " GiB"), (2**20, " MiB"), (2**10, " KiB"))
TIMES = ((86400.0, " d"), (3600.0, " h"), (60.0, " min"), (1.0, " s"), (1e-3, " ms"), (1e-6, " µs"))
SUFFIXES = {
    "percent": "%", "celsius": " °C", "watt": " W", "hertz": " Hz", "joule": " J", "ops": " /s",
    "cps": " /s", "reqps": " /s", "rps": " /s", "Bps": " B/s", "binBps": " B/s",
}  # fmt: skip


def spell(value: float, unit: str, decimals: int | None = None) -> str:
    """Write ``value`` with its unit: about three digits, or as many ``decimals`` as are stated."""
    if not math.isfinite(value):
        return {math.inf: "+Inf", -math.inf: "-Inf"}.get(value, "NaN")
    if unit == "percentunit":
        return f"{_digits(value * 100, decimals)}%"
    if unit in ("bytes", "decbytes"):
        return _scaled(value, BINARY, decimals, " B")
    if unit in ("s", "dtdurations"):
        return _scaled(value, TIMES, decimals, " s")
    if unit == "locale":
        return f"{value:,.0f}"
    if unit == "sci":
        return f"{value:.3g}" if decimals is None else f"{value:.{decimals}e}"
    if unit in SUFFIXES:
        return _scaled(value, POWERS, decimals, "") + SUFFIXES[unit]
    return _scaled(value, POWERS, decimals, "") if unit == "short" else _digits(value, decimals)


def _scaled(value: float, steps: tuple[tuple[float, str], ...], decimals: int | None, least: str) -> str:
    for size, suffix in steps:
        if abs(value) >= size:
            return _digits(value / size, decimals) + suffix
    return _digits(value, decimals) + least


def _digits(value: float, decimals: int | None) -> str:
    if decimals is not None:
        return f"{value:.{decimals}f}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"
