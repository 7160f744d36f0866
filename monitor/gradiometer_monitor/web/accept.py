"""What a client asks for: the content type and the coding of an answer, by RFC 9110."""

from __future__ import annotations

import math
from collections.abc import Iterator

from gradiometer_monitor.exposition.exposition import OPENMETRICS, TEXT

__all__ = ["accepts_gzip", "negotiate"]

_OFFERS = {TEXT: ("text", "plain", "0.0.4"), OPENMETRICS: ("application", "openmetrics-text", "1.0.0")}


def negotiate(accept: str) -> str:
    """Choose the content type for an ``Accept`` header: OpenMetrics if it is preferred to plain text, or named only.

    A range that names a type more closely counts for it, whatever wider ones say. Parameters but ``version`` and ``q``
    are passed over: our names need no escaping. Who accepts neither gets plain text, as Prometheus' own servers do it.
    """
    ranges = list(_items(accept))
    text, openmetrics = (_preference(ranges, content_type) for content_type in (TEXT, OPENMETRICS))
    return OPENMETRICS if openmetrics > text and openmetrics[0] > 0 else TEXT


def _preference(ranges: list[tuple[str, dict[str, str]]], content_type: str) -> tuple[float, int]:
    """Return the quality that the closest range gives a content type, and how close that is; 0 if there is none."""
    kind, subtype, version = _OFFERS[content_type]
    found = [(0, 0.0)]
    for name, parameters in ranges:
        close = {f"{kind}/{subtype}": 3, f"{kind}/*": 2, "*/*": 1}.get(name, 0)
        if close and parameters.get("version", version) == version:
            found.append((close + ("version" in parameters), _quality(parameters)))
    close, quality = max(found)
    return quality, close


def accepts_gzip(accept_encoding: str) -> bool:
    """Tell from an ``Accept-Encoding`` header whether gzip may be sent, and is not wanted less than the bare body."""
    wanted = {name: _quality(parameters) for name, parameters in _items(accept_encoding)}
    gzip = wanted.get("gzip", wanted.get("x-gzip", wanted.get("*", 0.0)))
    return gzip > 0 and gzip >= wanted.get("identity", 0.0)


def _items(header: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Split a header into names and their parameters, all in lower case."""
    for item in header.lower().split(","):
        name, *parameters = (part.strip() for part in item.split(";"))
        pairs = (part.split("=", 1) for part in parameters if "=" in part)
        yield name, {key.strip(): value.strip().strip('"') for key, value in pairs}


def _quality(parameters: dict[str, str]) -> float:
    """Return the weight; one that is no number from 0 to 1 is none."""
    try:
        quality = float(parameters.get("q", "1"))
    except ValueError:
        return 0.0
    return quality if math.isfinite(quality) and 0 <= quality <= 1 else 0.0
