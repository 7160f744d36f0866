"""How a panel says that its series look: colours, names and units, through its defaults and its overrides."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gradiometer_dashboards.drawing.shades import SERIES, judged, shade, shaded
from gradiometer_dashboards.drawing.units import spell
from gradiometer_dashboards.evaluation import Answer, Series

__all__ = ["Curve", "curves", "reduce", "setting", "worded"]

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """A series with its looks."""

    series: Series
    name: str
    colour: str
    """Hex."""
    own: Json
    """Properties of the field, by name: those of the panel with its overrides."""


def curves(panel: Json, answers: list[Answer]) -> list[Curve]:
    """Give each series of the answers its looks; colours that nobody states go round."""
    found, free = [], 0
    alikes: dict[str, int] = {}
    for answer in answers:
        for series in answer.series:
            own = setting(panel, series.legend, answer.ref_id)
            stated = own.get("color", {})
            if stated.get("mode") in ("fixed", "shades"):
                colour, alike = stated["fixedColor"], alikes.get(answer.ref_id, 0)
                alikes[answer.ref_id] = alike + 1
                colour = shaded(colour, alike) if stated["mode"] == "shades" else shade(colour)
            else:
                colour, free = shade(SERIES[free % len(SERIES)]), free + 1
            name = own.get("displayName") or series.legend or "Value"
            found.append(Curve(series=series, name=name, colour=colour, own=own))
    return found


def setting(panel: Json, name: str, ref_id: str = "") -> Json:
    """Return the properties of a field: the panel's defaults, under the overrides that match it."""
    config = panel.get("fieldConfig") or {}
    own: Json = {}
    for key, value in (config.get("defaults") or {}).items():
        own |= {f"custom.{inner}": each for inner, each in value.items()} if key == "custom" else {key: value}
    for override in config.get("overrides") or ():
        if _matches(override["matcher"], name, ref_id):
            own |= {each["id"]: each["value"] for each in override["properties"]}
    return own


def _matches(matcher: Json, name: str, ref_id: str) -> bool:
    kind, wanted = matcher["id"], matcher.get("options")
    if kind == "byName":
        return bool(wanted == name)
    if kind == "byRegexp":
        return re.search(str(wanted).strip("/"), name) is not None
    return kind == "byFrameRefID" and wanted == ref_id


def reduce(values: list[float], calculation: str) -> float:
    """Reduce a series to a number as Grafana names it; values that are not finite numbers count as they are."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return math.nan
    mean = sum(known) / len(known)
    found = {"lastNotNull": known[-1], "last": values[-1], "max": max(known), "min": min(known), "mean": mean}
    return {**found, "sum": sum(known)}[calculation]


def worded(value: float, own: Json) -> tuple[str, str]:
    """Return the text and the hex colour of a value: of its mapping if it has one, else by unit and thresholds."""
    for text, colour in _mapped(value, own):
        return text, shade(colour or "text")
    steps = (own.get("thresholds") or {}).get("steps") or ()
    fixed = (own.get("color") or {}).get("fixedColor") if (own.get("color") or {}).get("mode") == "fixed" else None
    return spell(value, own.get("unit", "none"), own.get("decimals")), shade(fixed or judged(value, steps))


def _mapped(value: float, own: Json) -> Iterator[tuple[str, str | None]]:
    for mapping in own.get("mappings") or ():
        options, kind = mapping["options"], mapping["type"]
        fits = {
            "value": f"{value:g}" in options,
            "range": kind == "range" and _within(value, options),
            "special": math.isnan(value) and "nan" in str(options.get("match")),
        }
        if fits.get(kind):
            result = options[f"{value:g}"] if kind == "value" else options["result"]
            yield result.get("text") or f"{value:g}", result.get("color")


def _within(value: float, options: Json) -> bool:
    low, high = options.get("from"), options.get("to")
    return (low is None or value >= low) and (high is None or value <= high)
