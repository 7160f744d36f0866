"""The committed dashboards taken apart for tests: panels of collapsed rows too, and what their PromQL names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest

from gradiometer.metrics import CATALOGUE, Metric
from gradiometer_dashboards import build, load

__all__ = [
    "NAMES",
    "PARTS",
    "Target",
    "each_panel",
    "each_target",
    "every_panel",
    "every_target",
    "metric_of",
    "panel_titled",
    "panels",
    "rows_and_panels",
    "strings_under",
    "targets",
    "variables",
]

Json = dict[str, Any]
NAMES = tuple(build.DASHBOARDS)
PARTS = {f"{m.name}{p}": m for m in CATALOGUE.values() if m.kind == "histogram" for p in ("_bucket", "_sum", "_count")}
"""Series of a histogram to its metric."""
LABELS_OF = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)")
WORDS = {"and", "or", "unless", "bool", "offset", "by", "without", "on", "ignoring", "group_left", "group_right"}
WORDS |= {"Inf", "NaN", "inf", "nan"}
RANGED = re.compile(r"(\w+)\(\s*(\w+)(?:\{[^}]*\})?\[([^\]]+)\]\s*(?:@ end\(\)\s*)?\)")


@dataclass(frozen=True, kw_only=True)
class Target:
    """One query of a panel, and where it is."""

    board: str
    panel: Json
    target: Json

    @property
    def expr(self) -> str:
        return str(self.target["expr"])

    @property
    def legend(self) -> str:
        return str(self.target.get("legendFormat", ""))

    @property
    def selectors(self) -> list[tuple[str, str]]:
        """Each metric with its matchers as they stand; none where it has no braces."""
        found = re.findall(r"([a-zA-Z_:][\w:]*)\{([^}]*)\}", self.expr)
        bare = [(name, "") for name in _bare(self.expr)]
        return [*found, *bare]

    @property
    def metrics(self) -> set[str]:
        return {name for name, _ in self.selectors}

    @property
    def ranges(self) -> list[tuple[str, str, str]]:
        """Each range of a metric: the function over it, the metric, and the span."""
        return RANGED.findall(self.expr)

    @property
    def id(self) -> str:
        return f"{self.board}-{self.panel['title']}-{self.target['refId']}"


def _bare(expr: str) -> Iterator[str]:
    """Yield the metrics that stand without braces: names that are no function, label or word of PromQL."""
    rest = re.sub(r'"(?:[^"\\]|\\.)*"', "", expr)
    rest = re.sub(r"[a-zA-Z_:][\w:]*\{[^}]*\}|\[[^\]]*\]", "", LABELS_OF.sub("", rest))
    for match in re.finditer(r"(?<![\w$.])([a-zA-Z_:][\w:]*)(\s*\()?", rest):
        if not match[2] and match[1] not in WORDS:
            yield match[1]


def metric_of(series: str) -> Metric | None:
    """Find the metric of a series in the catalogue: a histogram's have suffixes."""
    return CATALOGUE.get(series) or PARTS.get(series)


@cache
def _board(name: str) -> Json:
    return load(name)


def rows_and_panels(name: str) -> list[Json]:
    """List all that has an id, as it stands on the dashboard; what a collapsed row holds comes after it."""
    found: list[Json] = []
    for panel in _board(name)["panels"]:
        found += [panel, *(panel.get("panels") or [])]
    return found


def panels(name: str) -> list[Json]:
    return [panel for panel in rows_and_panels(name) if panel["type"] != "row"]


def panel_titled(name: str, title: str) -> Json:
    (found,) = [panel for panel in panels(name) if panel["title"] == title]
    return found


def targets(name: str) -> list[Target]:
    return [Target(board=name, panel=p, target=t) for p in panels(name) for t in p.get("targets", ())]


def variables(name: str) -> dict[str, Json]:
    return {variable["name"]: variable for variable in _board(name)["templating"]["list"]}


def every_panel() -> list[Any]:
    """Give each panel of every dashboard, named, as parameters."""
    return [pytest.param(panel, id=f"{name}-{panel['title']}") for name in NAMES for panel in panels(name)]


def every_target() -> list[Any]:
    """Give each target of every dashboard, named, as parameters."""
    return [pytest.param(target, id=target.id) for name in NAMES for target in targets(name)]


def each_panel(test: Callable[[Json], None]) -> Callable[[], None]:
    """Make of a test of one panel a test of all."""
    return _of_each(test, every_panel())


def each_target(test: Callable[[Target], None]) -> Callable[[], None]:
    """Make of a test of one target a test of all."""
    return _of_each(test, every_target())


def _of_each(test: Callable[[Any], None], parts: list[Any]) -> Callable[[], None]:
    """Loop, and name the one that fails: to collect and report thousands of tests takes longer than to run them."""

    def of_each() -> None:
        for part in parts:
            try:
                test(*part.values)
            except AssertionError as error:
                error.add_note(part.id)
                raise

    of_each.__name__, of_each.__doc__ = test.__name__, test.__doc__
    return of_each


def strings_under(value: Any, key: str) -> Iterator[str]:
    """Yield the texts that stand under a key, at any depth."""
    if isinstance(value, dict):
        for name, each in value.items():
            if name == key and isinstance(each, str):
                yield each
            else:
                yield from strings_under(each, key)
    elif isinstance(value, list):
        for each in value:
            yield from strings_under(each, key)
