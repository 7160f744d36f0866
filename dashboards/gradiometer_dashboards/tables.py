"""Tables that join queries: one row for each value of a label, one query a column, coloured cells, links onwards.

Guarantees: one row a value of the key however many hosts export it, as long as each column's query returns one series a
key; a link hands over the time range, the data source, the job and the hosts chosen beside the row's run.
Assumes that a query's labels are the key and, for a column of text, its label: Grafana would take others for columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import table, timeseries
from grafana_foundation_sdk.models import dashboard

from gradiometer_dashboards.panels import Card, Step, tabular, value_names
from gradiometer_dashboards.promql import Query

__all__ = ["Column", "joined", "labelled", "link_to", "link_within", "linked"]

CONTEXT = "${__url_time_range}&${datasource:queryparam}&${job:queryparam}&${instance:queryparam}"
"""What a link hands over: Grafana writes ``from`` and ``to``, and ``var-NAME=…`` for each value of a variable."""

Properties = list[dashboard.DynamicConfigValue]
Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """One column: its header, what fills it, and how its cells look."""

    title: str
    expr: str = ""
    """One series a row; empty for a label that the rows have anyway."""
    label: str | None = None
    """Show this label's value in place of the number."""
    unit: str = "none"
    decimals: int | None = None
    steps: tuple[Step, ...] = ()
    """(from, colour) of the cell's background, the first from minus infinity."""
    names: Mapping[int, tuple[str, str]] = field(default_factory=dict)
    """Text and colour that stand for a number."""
    links: tuple[Json, ...] = ()
    width: int | None = None
    """In pixels."""


def link_to(board: str, title: str, run: str = "${__data.fields.run_id}") -> Json:
    """Link to another dashboard of ours, with the run of a table's row."""
    return _link(board, title, f"var-run_id={run}")


def link_within(board: str, title: str, key: str, value: str) -> Json:
    """Link to another dashboard of ours about the run that is shown, with one ``rank`` or ``layer`` of it chosen."""
    kept = (f"${{{name}:queryparam}}" for name in ("run_id", "rank", "layer") if name != key)
    return _link(board, title, *kept, f"var-{key}={value}")


def linked(panel: timeseries.Panel, board: str, title: str) -> timeseries.Panel:
    """Let each series of a graph, which has the label ``run_id``, lead to its run."""
    links = [link_to(board, title, "${__field.labels.run_id}")]
    return panel.override_by_regexp("/.*/", [dashboard.DynamicConfigValue("links", links)])


def joined(card: Card, key: Column, columns: Sequence[Column], order: str) -> table.Panel:
    """Join the columns on ``key``, whose label names it; rows with the largest ``order`` are on top."""
    assert key.label
    shown = [column for column in columns if column.expr]
    queries = [Query(expr=order, legend="order"), *(Query(expr=each.expr, legend=each.title) for each in shown)]
    letters = [chr(ord("A") + index) for index in range(len(queries))]
    headers = {key.label: key.title}
    for column, letter in zip(shown, letters[1:], strict=True):
        headers[column.label or f"Value #{letter}"] = column.title
    panel = tabular(card, *queries)
    for transformation in _joining(key.label, headers):
        panel = panel.with_transformation(transformation)
    return _columns(panel, [key, *columns])


def labelled(card: Card, query: Query, columns: Sequence[Column]) -> table.Panel:
    """List the series of one query, largest value on top; the column without a label shows the value."""
    headers = {column.label or "Value": column.title for column in columns}
    largest = common_builders.TableSortByFieldState().display_name(headers["Value"]).desc(True)
    panel = (
        tabular(card, query)
        .with_transformation(_only(headers))
        .with_transformation(_organized(headers))
        .sort_by([largest])
    )
    return _columns(panel, columns)


def _link(board: str, title: str, *more: str) -> Json:
    return {"title": title, "url": f"/d/gradiometer-{board}?{'&'.join((CONTEXT, *more))}", "targetBlank": False}


def _joining(key: str, headers: Mapping[str, str]) -> list[dashboard.DataTransformerConfig]:
    """Drop the times, join, put what needs attention on top, then name and order what is shown."""
    return [
        _only({**headers, "Value #A": ""}),
        dashboard.DataTransformerConfig(id_val="joinByField", options={"byField": key, "mode": "outer"}),
        dashboard.DataTransformerConfig(
            id_val="sortBy", options={"fields": {}, "sort": [{"field": "Value #A", "desc": True}]}
        ),
        _organized(headers, hidden="Value #A"),
    ]


def _only(names: Mapping[str, str]) -> dashboard.DataTransformerConfig:
    return dashboard.DataTransformerConfig(id_val="filterFieldsByName", options={"include": {"names": list(names)}})


def _organized(headers: Mapping[str, str], hidden: str = "Time") -> dashboard.DataTransformerConfig:
    return dashboard.DataTransformerConfig(
        id_val="organize",
        options={
            "excludeByName": {hidden: True},
            "includeByName": {},
            "indexByName": {name: index for index, name in enumerate(headers)},
            "renameByName": dict(headers),
        },
    )


def _columns(panel: table.Panel, columns: Sequence[Column]) -> table.Panel:
    for column in columns:
        panel = panel.override_by_name(column.title, _looks(column))
    return panel


def _looks(column: Column) -> Properties:
    # Without its unit a text that looks like a number would be formatted as one, in the cell and in a link.
    values: Json = {"unit": "string" if column.label else column.unit}
    if column.decimals is not None:
        values["decimals"] = column.decimals
    if column.steps:
        steps = [{"value": start, "color": colour} for start, colour in column.steps]
        values["thresholds"] = {"mode": "absolute", "steps": steps}
    if column.names:
        values["mappings"] = [value_names(column.names)]
    if column.steps or column.names:
        values["custom.cellOptions"] = {"type": "color-background", "mode": "basic"}
    if column.links:
        values["links"] = list(column.links)
    if column.label:
        values["custom.filterable"] = True
    if column.width:
        values["custom.width"] = column.width
    return [dashboard.DynamicConfigValue(name, value) for name, value in values.items()]
