"""Answer the queries of a dashboard as Grafana would: from a Prometheus, and without a Grafana.

What follows Grafana 11 and later: which values variables have and how they stand in PromQL, ``$__interval`` from range,
width and minima, ``$__rate_interval`` from that, ranges aligned to the step and instants not, panels that collapsed
rows hide, repeated panels, annotations from queries, names of series. What it leaves out: regular expressions over a
variable's values, panels with a time range of their own, rows that repeat; each of them is refused. Needs nothing
outside the standard library.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from gradiometer_dashboards import interpolation

__all__ = ["Answer", "Prometheus", "QueryError", "Resolution", "Series", "View"]

Json = dict[str, Any]

COLUMNS = 24
"""Of which a dashboard is wide."""
SAFE_POINTS = 11_000
"""Prometheus refuses a query of more."""
ALL = "$__all"
INTERVALS = ("$__interval", "$__interval_ms", "${__interval}", "${__interval_ms}")
RATE_INTERVALS = ("$__rate_interval", "$__rate_interval_ms", "${__rate_interval}", "${__rate_interval_ms}")
ANNOTATION_STEP = "60s"
ANNOTATION_POINTS = 100
MAX_BYTES = 256 * 2**20
"""Of one answer: a panel's hundred series of 11 000 points each are a tenth of it."""
CHUNK_BYTES, SAID_BYTES = 2**16, 2**12
"""Read at once, and of what an error says."""


class QueryError(RuntimeError):
    """Prometheus did not answer a query, or refused it; says which and why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One series of an answer."""

    labels: dict[str, str]
    legend: str
    times: list[float]
    """Unix seconds."""
    values: list[float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What one target of a panel got."""

    ref_id: str
    expr: str
    """As it was sent: with its variables filled."""
    instant: bool
    series: list[Series]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prometheus:
    """A Prometheus, or what speaks as it does, at ``url``; an answer takes ``timeout_seconds`` at most."""

    url: str
    timeout_seconds: float = 30.0

    def ask(self, path: str, **parameters: str) -> Any:
        """Return the ``data`` of an answer; raises QueryError."""
        address, encoded = f"{self.url.rstrip('/')}/api/v1/{path}", urllib.parse.urlencode(parameters)
        get = path.startswith("label/")  # of which Prometheus takes no POST
        request = urllib.request.Request(  # noqa: S310 - the URL is the caller's
            f"{address}?{encoded}" if get else address, data=None if get else encoded.encode()
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_seconds) as response:  # noqa: S310
                return _data(self._read(response))
        except urllib.error.HTTPError as error:
            said = ""
            with error, contextlib.suppress(OSError, http.client.HTTPException):
                said = error.read(SAID_BYTES).decode(errors="replace")
            raise QueryError(f"{path} {parameters}: {error.code} {said}") from error
        except (ValueError, RecursionError) as error:
            raise QueryError(f"{self.url} answers {path} as no Prometheus does: {error}") from error
        except (OSError, http.client.HTTPException) as error:
            raise QueryError(f"{self.url} does not answer {path}: {error}") from error

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        """Read an answer to its end, which it must have."""
        deadline, found = time.monotonic() + self.timeout_seconds, bytearray()
        while chunk := response.read1(CHUNK_BYTES):
            found += chunk
            if len(found) > MAX_BYTES:
                raise ValueError(f"it has more than {MAX_BYTES} bytes")
            if time.monotonic() > deadline:
                raise TimeoutError(f"it has not ended after {self.timeout_seconds:g} s")
        return bytes(found)


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolution:
    """How finely one target is asked, in seconds."""

    step: float
    """``$__interval``: how far two points are apart."""
    rate: float
    """``$__rate_interval``."""

    @classmethod
    def of(
        cls, milliseconds: float, points: int, *, scrape: float, panel_minimum: str = "", target: Mapping[str, Any]
    ) -> Resolution:
        """Work out what Grafana takes for a range of so many milliseconds, drawn in ``points`` columns.

        ``scrape`` is the interval that the data source states, ``panel_minimum`` the panel's own *Min interval*;
        the target's *Min step* is the highest of the three.
        """
        lowest = interpolation.seconds_of(panel_minimum) if panel_minimum else scrape
        asked = max(interpolation.round_interval(milliseconds / points), round(lowest * 1000))
        minimum, rated = _minimum(target), target.get("interval", "") in RATE_INTERVALS
        least = asked if minimum is None else round(minimum * 1000)
        exact = milliseconds / points
        step = least if exact < least else interpolation.round_interval(exact)
        step = max(step, interpolation.round_interval(milliseconds / SAFE_POINTS))
        if rated:
            step = round(_rate(step / 1000, scrape) * 1000)
            return cls(step=step / 1000, rate=step / 1000)
        step *= target.get("intervalFactor") or 1
        stated = step / 1000 if target.get("interval") in INTERVALS else scrape if minimum is None else minimum
        return cls(step=step / 1000, rate=_rate(asked / 1000, stated))


@dataclass(frozen=True, kw_only=True)
class View:
    """A dashboard opened at a time range; ``chosen`` are the variables that somebody set, by name."""

    dashboard: Json
    prometheus: Prometheus
    start: float
    """Unix seconds, as is ``end``."""
    end: float
    chosen: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    """``$__all`` is *All*."""
    scrape_interval: float = 15.0
    """As the data source states it, in seconds."""
    utc_offset: float = 0.0
    """Of whoever looks, in seconds: ranges are aligned to their midnight."""
    width: int = 1440
    """Of the dashboard, in pixels: a panel asks for a point a pixel."""

    @property
    def panels(self) -> list[Json]:
        """The panels with queries, those within collapsed rows too; a repeated one once for each value."""
        found: list[Json] = []
        for panel in _flat(self.dashboard["panels"]):
            if panel.get("repeat"):
                found += self._repeated(panel)
            elif panel.get("targets"):
                found.append(panel)
        return found

    @cached_property
    def variables(self) -> dict[str, str]:
        """Each variable as it stands in a query: what is chosen, else *All* or the first value that there is."""
        filled: dict[str, str] = {}
        for variable in self.dashboard["templating"]["list"]:
            name, many = variable["name"], _many(variable)
            chosen = self._selected(variable, filled)
            if chosen == (ALL,) and variable.get("allValue"):
                filled[name] = variable["allValue"]
            elif chosen == (ALL,):
                filled[name] = interpolation.formatted(self._options(variable, filled), many=True)
            else:
                filled[name] = interpolation.formatted(chosen, many=many)
        return filled

    def options(self, name: str) -> list[str]:
        """List what may be chosen for a variable, in the order in which Grafana offers it, without *All*."""
        return self._options(self._variable(name), self.variables)

    def selected(self, name: str) -> tuple[str, ...]:
        """Return the values of a variable as its menu shows them: ``$__all`` is *All*."""
        return self._selected(self._variable(name), self.variables)

    def resolution(self, panel: Json, target: Mapping[str, Any] | None = None) -> Resolution:
        """Work out how finely a target is asked, the panel's first unless told otherwise."""
        if panel.get("timeFrom") or panel.get("timeShift"):
            raise ValueError(f"panel {panel['title']!r} has a time range of its own, which is not evaluated: remove it")
        points = panel.get("maxDataPoints") or panel["gridPos"]["w"] * self.width // COLUMNS
        return Resolution.of(
            (self.end - self.start) * 1000,
            points,
            scrape=self.scrape_interval,
            panel_minimum=panel.get("interval") or "",
            target=panel["targets"][0] if target is None else target,
        )

    def interval(self, panel: Json) -> float:
        """Return ``$__interval`` in seconds: how far two points of the panel are apart."""
        return self.resolution(panel).step

    def fill(self, text: str, interval: float | Resolution) -> str:
        """Replace the variables in a query, for a resolution or a step in seconds."""
        if not isinstance(interval, Resolution):
            interval = Resolution(step=interval, rate=_rate(interval, self.scrape_interval))
        return interpolation.replaced(text, {**self._times(), **_spelt(interval), **self.variables})

    def answers(self, panel: Json) -> list[Answer]:
        """Ask what a panel asks; raises QueryError."""
        shown = [target for target in panel["targets"] if not target.get("hide") and target.get("expr")]
        return [answer for target in shown for answer in self._answers(panel, target)]

    def annotations(self) -> dict[str, Answer]:
        """Ask for the annotations that come from PromQL and are switched on; by name."""
        found = {}
        for each in self.dashboard.get("annotations", {}).get("list", ()):
            expr = each.get("expr") or (each.get("target") or {}).get("expr")
            if expr and each.get("enable", True):
                target = {"refId": "X", "expr": expr, "interval": each.get("step") or ANNOTATION_STEP}
                start, end = math.floor(self.start), math.ceil(self.end)
                span = (end - start) * 1000.0
                resolution = Resolution.of(span, ANNOTATION_POINTS, scrape=self.scrape_interval, target=target)
                found[each["name"]] = self._range(target, self.fill(expr, resolution), resolution.step, start, end)
        return found

    def link(self, url: str, fields: Mapping[str, str] | None = None) -> str:
        """Follow a link: ``${rank:queryparam}``, the time range, and the row's ``fields`` or the series' labels."""
        fields = fields or {}

        def write(name: str, path: str, form: str) -> str | None:
            if name == "__url_time_range":
                return f"from={round(self.start * 1000)}&to={round(self.end * 1000)}"
            if name in ("__data", "__field", "__value", "__series"):
                found = fields[re.sub(r'^\.(?:fields|labels)\.?|^\.|["\[\]]', "", path)]
                return urllib.parse.quote(found, safe="") if form == "percentencode" else found
            if form == "queryparam":
                return interpolation.query_parameters(name, self.selected(name))
            return None

        return interpolation.replaced(url, self.variables, write)

    def _answers(self, panel: Json, target: Json) -> Iterator[Answer]:
        resolution = self.resolution(panel, target)
        own = {name: interpolation.escape_regex(value) for name, value in panel.get("scopedVars", {}).items()}
        expr = self.fill(interpolation.replaced(target["expr"], own), resolution)
        if target.get("range") or not target.get("instant"):
            yield self._range(target, expr, resolution.step, self.start, self.end)
        if target.get("instant"):
            data = self.prometheus.ask("query", query=expr, time=f"{self.end:.3f}")
            yield _answer(target, expr, data, instant=True)

    def _range(self, target: Json, expr: str, step: float, start: float, end: float) -> Answer:
        first, last = (self._aligned(edge, step) for edge in (start, end))
        span = {"start": f"{first:.3f}", "end": f"{last:.3f}", "step": f"{step:.3f}"}
        return _answer(target, expr, self.prometheus.ask("query_range", query=expr, **span), instant=False)

    def _aligned(self, time: float, step: float) -> float:
        offset, size = round(self.utc_offset * 1000), round(step * 1000)
        return ((round(time * 1000) + offset) // size * size - offset) / 1000

    def _times(self) -> dict[str, str]:
        start, end = round(self.start * 1000), round(self.end * 1000)
        seconds = math.floor((end - start) / 1000 + 0.5)
        return {
            "__range": f"{seconds}s",
            "__range_s": f"{seconds}",
            "__range_ms": f"{end - start}",
            "__from": f"{start}",
            "__to": f"{end}",
        }

    def _variable(self, name: str) -> Json:
        return next(each for each in self.dashboard["templating"]["list"] if each["name"] == name)

    def _selected(self, variable: Json, filled: Mapping[str, str]) -> tuple[str, ...]:
        chosen = self.chosen.get(variable["name"])
        if chosen is not None:
            return (chosen,) if isinstance(chosen, str) else tuple(chosen)
        stored = interpolation.current(variable)
        if variable["type"] != "query":
            return stored or ("",)
        if variable.get("includeAll") and (not stored or stored == (ALL,)):
            return (ALL,)
        options = self._options(variable, filled)
        kept = tuple(value for value in stored if value in options)
        return kept or (ALL if variable.get("includeAll") else next(iter(options), ""),)

    def _options(self, variable: Json, filled: Mapping[str, str]) -> list[str]:
        if variable.get("regex"):
            raise ValueError(f"variable {variable['name']!r} has a regex, which is not evaluated: remove it")
        query = variable["query"] if isinstance(variable["query"], str) else variable["query"]["query"]
        match = re.fullmatch(r"label_values\((?:(.+),\s*)?([a-zA-Z_]\w*)\)\s*", query)
        if match is None:
            raise ValueError(f"variable {variable['name']!r} asks {query!r}, expected label_values(series, label)")
        asked = {"start": f"{math.floor(self.start)}", "end": f"{math.ceil(self.end)}"}
        if match[1]:
            asked["match[]"] = interpolation.replaced(match[1], {**self._times(), **filled})
        found = self.prometheus.ask(f"label/{match[2]}/values", **asked)
        if not isinstance(found, list) or not all(isinstance(value, str) for value in found):
            raise QueryError(f"{query}: the answer is not of Prometheus' form: it is no list of texts")
        return interpolation.ordered(found, variable.get("sort") or 0)

    def _repeated(self, panel: Json) -> Iterator[Json]:
        name = panel["repeat"]
        values = self.selected(name)
        for value in self.options(name) if values == (ALL,) else values:
            title = interpolation.replaced(panel["title"], {name: value})
            yield {**panel, "title": title, "scopedVars": {name: value}}


def _flat(panels: Sequence[Json]) -> Iterator[Json]:
    for panel in panels:
        if panel["type"] != "row":
            yield panel
        elif panel.get("repeat"):
            raise ValueError(f"row {panel.get('title')!r} repeats, which is not evaluated: repeat its panels")
        else:
            yield from panel.get("panels") or ()


def _many(variable: Json) -> bool:
    return bool(variable.get("multi") or variable.get("includeAll"))


def _minimum(target: Mapping[str, Any]) -> float | None:
    """Return a target's *Min step* in seconds, if it has one that is no variable."""
    text = target.get("interval") or ""
    return None if text in ("", "0s", *INTERVALS, *RATE_INTERVALS) else interpolation.seconds_of(text)


def _rate(interval: float, scrape: float) -> float:
    return max(interval + scrape, 4 * scrape)


def _spelt(resolution: Resolution) -> dict[str, str]:
    return {
        "__interval": interpolation.span(resolution.step),
        "__interval_ms": f"{round(resolution.step * 1000)}",
        "__rate_interval": interpolation.go_duration(resolution.rate),
        "__rate_interval_ms": f"{round(resolution.rate * 1000)}",
    }


def _data(text: bytes) -> Any:
    """Return what an answer holds; raises ValueError if it is not of Prometheus' form."""
    answer = json.loads(text)
    if not isinstance(answer, dict) or "data" not in answer:
        raise ValueError("it is no object with 'data'")
    return answer["data"]


def _answer(target: Json, expr: str, data: Any, *, instant: bool) -> Answer:
    try:
        scalar = data["resultType"] in ("scalar", "string")
        found: list[Json] = [{"metric": {}, "value": data["result"]}] if scalar else data["result"]
        labels = [_labels(each) for each in found]
        points = [_points(each) for each in found]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise QueryError(f"{expr}: the answer is not of Prometheus' form: {error!r}") from error
    form, automatic = target.get("legendFormat") or "", interpolation.named_by_labels(labels)
    series = [
        Series(
            labels=own,
            legend=interpolation.legend(form, own, expr) or (name if form == "__auto" else ""),
            times=[moment for moment, _ in pairs],
            values=[value for _, value in pairs],
        )
        for own, name, pairs in zip(labels, automatic, points, strict=True)
        if pairs
    ]
    return Answer(ref_id=target["refId"], expr=expr, instant=instant, series=series)


def _labels(each: Json) -> dict[str, str]:
    return {str(name): str(value) for name, value in each["metric"].items()}


def _points(each: Json) -> list[tuple[float, float]]:
    pairs = each["values"] if "values" in each else [each["value"]]
    found = [(float(moment), float(value)) for moment, value in pairs]
    if not all(math.isfinite(moment) for moment, _ in found):
        raise ValueError("a point has no time")
    return found
