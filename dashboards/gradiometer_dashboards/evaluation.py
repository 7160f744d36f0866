"""Answer the queries of a dashboard as Grafana would: from a Prometheus, and without a Grafana.

What follows Grafana: values of queried variables and how they are written into PromQL (several as an escaped
alternation), ``$__interval`` from the range and the panel's width and rounded, ``$__rate_interval`` from that and the
scrape interval, ranges aligned to the step. Sources: Grafana's documentation of the Prometheus data source and of
global variables. Needs nothing outside the standard library.
"""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

__all__ = ["Answer", "Prometheus", "QueryError", "Series", "View"]

Json = dict[str, Any]

ROUNDED = (
    (0.015, 0.01), (0.035, 0.02), (0.075, 0.05), (0.15, 0.1), (0.35, 0.2), (0.75, 0.5), (1.5, 1), (3.5, 2), (7.5, 5),
    (12.5, 10), (17.5, 15), (25, 20), (45, 30), (90, 60), (210, 120), (450, 300), (750, 600), (1050, 900), (1500, 1200),
    (2700, 1800), (5400, 3600), (9000, 7200), (16200, 10800), (32400, 21600), (86400, 43200), (604800, 86400),
)  # fmt: skip
"""Below how many seconds an interval becomes which."""

PIXELS_OF_A_COLUMN = 60
"""Of the 24 that a dashboard is wide, on a screen of 1440 pixels."""


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
    """A Prometheus, or what speaks as it does, at ``url``; every request has ``timeout_seconds``."""

    url: str
    timeout_seconds: float = 30.0

    def ask(self, path: str, **parameters: str) -> Any:
        """Return the ``data`` of an answer; raises QueryError."""
        request = urllib.request.Request(  # noqa: S310 - the URL is the caller's
            f"{self.url.rstrip('/')}/api/v1/{path}", data=urllib.parse.urlencode(parameters).encode()
        )
        if path.startswith("label/"):
            request = urllib.request.Request(f"{request.full_url}?{urllib.parse.urlencode(parameters)}")  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_seconds) as response:  # noqa: S310
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            raise QueryError(f"{path} {parameters}: {error.code} {error.read().decode(errors='replace')}") from error
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            raise QueryError(f"{self.url} does not answer {path}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class View:
    """A dashboard opened at a time range; ``chosen`` are the variables that somebody set, by name."""

    dashboard: Json
    prometheus: Prometheus
    start: float
    """Unix seconds, as is ``end``."""
    end: float
    chosen: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    scrape_interval: float = 15.0
    """As the data source states it, in seconds."""

    @property
    def panels(self) -> list[Json]:
        """The panels with queries, rows and what Grafana draws of itself left out."""
        return [panel for panel in self.dashboard["panels"] if panel.get("targets")]

    @cached_property
    def variables(self) -> dict[str, str]:
        """Each variable as it stands in a query: what is chosen, else *All* or the first value that there is."""
        filled: dict[str, str] = {}
        for variable in self.dashboard["templating"]["list"]:
            if variable["type"] == "query":
                filled[variable["name"]] = self._value(variable, filled)
        return filled

    def interval(self, panel: Json) -> float:
        """Return ``$__interval`` in seconds: how far two points of the panel are apart."""
        points = panel.get("maxDataPoints") or panel["gridPos"]["w"] * PIXELS_OF_A_COLUMN
        exact = (self.end - self.start) / points
        rounded = next((value for below, value in ROUNDED if exact < below), 7 * 86400.0)
        return max(rounded, self.scrape_interval)

    def fill(self, text: str, interval: float) -> str:
        """Replace the variables in a query."""
        spans = {
            "__interval": interval,
            "__rate_interval": max(interval + self.scrape_interval, 4 * self.scrape_interval),
            "__range": self.end - self.start,
        }
        known = {name: f"{round(seconds * 1000)}ms" for name, seconds in spans.items()} | self.variables
        return _replaced(text, known)

    def answers(self, panel: Json) -> list[Answer]:
        """Ask what a panel asks; raises QueryError."""
        interval = self.interval(panel)
        return [answer for target in panel["targets"] for answer in self._answers(target, interval)]

    def _answers(self, target: Json, interval: float) -> Iterator[Answer]:
        expr = self.fill(target["expr"], interval)
        if target.get("instant"):
            data = self.prometheus.ask("query", query=expr, time=f"{self.end:.3f}")
            yield _answer(target, expr, data, instant=True)
        if target.get("range"):
            start, end = (edge // interval * interval for edge in (self.start, self.end))
            span = {"start": f"{start:.3f}", "end": f"{end:.3f}", "step": f"{interval:.3f}"}
            yield _answer(target, expr, self.prometheus.ask("query_range", query=expr, **span), instant=False)

    def _value(self, variable: Json, filled: Mapping[str, str]) -> str:
        chosen = self.chosen.get(variable["name"])
        several = variable.get("multi") or variable.get("includeAll")
        if chosen is None and variable.get("includeAll"):
            return str(variable["allValue"])
        if chosen is None:
            chosen = next(iter(self._values(variable, filled)), "")
        if not several:
            assert isinstance(chosen, str), variable["name"]
            return chosen.replace("\\", "\\\\").replace('"', '\\"')
        values = [_escaped(value) for value in ((chosen,) if isinstance(chosen, str) else chosen)]
        return values[0] if len(values) == 1 else f"({'|'.join(values)})"

    def _values(self, variable: Json, filled: Mapping[str, str]) -> list[str]:
        """List what may be chosen, in the order in which Grafana offers it."""
        query = variable["query"] if isinstance(variable["query"], str) else variable["query"]["query"]
        match = re.fullmatch(r"label_values\((.+), (\w+)\)", query)
        assert match, query
        span = {"start": f"{self.start:.3f}", "end": f"{self.end:.3f}"}
        found = self.prometheus.ask(f"label/{match[2]}/values", **{"match[]": _replaced(match[1], filled)}, **span)
        return sorted(found, reverse=variable.get("sort") in (2, 4, 6, 8))


def _replaced(text: str, known: Mapping[str, str]) -> str:
    return re.sub(r"\$(\w+)|\$\{(\w+)\}", lambda match: known[match[1] or match[2]], text)


def _escaped(value: str) -> str:
    """Escape a value for a regular expression within a string of PromQL."""
    return re.sub(r"[\\^$*+?.()|{}\[\]/]", lambda match: "\\\\" + ("\\\\" if match[0] == "\\" else match[0]), value)


def _answer(target: Json, expr: str, data: Json, *, instant: bool) -> Answer:
    series = [
        Series(
            labels=each["metric"],
            legend=_legend(target, each["metric"]),
            times=[float(time) for time, _ in _points(each)],
            values=[float(value) for _, value in _points(each)],
        )
        for each in (data["result"] if data["resultType"] != "scalar" else [{"metric": {}, "value": data["result"]}])
    ]
    return Answer(ref_id=target["refId"], expr=expr, instant=instant, series=series)


def _points(each: Json) -> list[tuple[float, str]]:
    return each["values"] if "values" in each else [each["value"]]


def _legend(target: Json, labels: Mapping[str, str]) -> str:
    form = target.get("legendFormat") or ""
    return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda match: labels.get(match[1], ""), form)
