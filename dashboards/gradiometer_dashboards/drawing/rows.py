"""What a table panel shows: its answers, through the transformations that it states, as rows of cells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gradiometer_dashboards.evaluation import Answer

__all__ = ["Table", "tabulate"]

Json = dict[str, Any]
Row = dict[str, Any]
Table = list[Row]
"""Rows from header to cell, in the order in which the columns stand."""


def tabulate(panel: Json, answers: Sequence[Answer]) -> Table:
    """Apply a panel's transformations; raises ValueError for one that is not known here."""
    several = len(answers) > 1
    frames = [_frame(answer, f"Value #{answer.ref_id}" if several else "Value") for answer in answers]
    for transformation in panel.get("transformations") or ():
        kind, options = transformation["id"], transformation["options"]
        if kind not in TRANSFORMATIONS:
            raise ValueError(f"panel {panel['title']!r} has the transformation {kind!r}, which is not drawn")
        frames = TRANSFORMATIONS[kind](frames, options)
    rows = [row for frame in frames for row in frame]
    for sort in panel.get("options", {}).get("sortBy") or ():
        rows = _sorted(rows, sort["displayName"], descending=bool(sort.get("desc")))
    return rows


def _frame(answer: Answer, value: str) -> Table:
    return [{"Time": s.times[-1], **s.labels, value: s.values[-1]} for s in answer.series if s.values]


def _only(frames: list[Table], options: Json) -> list[Table]:
    names = options["include"]["names"]
    return [[{name: cell for name, cell in row.items() if name in names} for row in frame] for frame in frames]


def _joined(frames: list[Table], options: Json) -> list[Table]:
    key = options["byField"]
    rows: dict[Any, Row] = {}
    for frame in frames:
        for row in frame:
            if key in row:
                rows.setdefault(row[key], {}).update(row)
    return [list(rows.values())]


def _merged(frames: list[Table], _: Json) -> list[Table]:
    """Join rows that are alike in all that they share but their values."""
    rows: dict[tuple[Any, ...], Row] = {}
    for frame in frames:
        for row in frame:
            labels = sorted((k, v) for k, v in row.items() if isinstance(v, str))
            rows.setdefault(tuple(labels), {}).update(row)
    return [list(rows.values())]


def _sort_by(frames: list[Table], options: Json) -> list[Table]:
    for sort in options.get("sort") or ():
        frames = [_sorted(frame, sort["field"], descending=bool(sort.get("desc"))) for frame in frames]
    return frames


def _organized(frames: list[Table], options: Json) -> list[Table]:
    hidden = {name for name, is_hidden in (options.get("excludeByName") or {}).items() if is_hidden}
    order, renamed = options.get("indexByName") or {}, options.get("renameByName") or {}

    def place(name: str) -> int:
        return int(order.get(name, len(order)))

    return [
        [
            {renamed.get(name) or name: row[name] for name in sorted(row, key=place) if name not in hidden}
            for row in frame
        ]
        for frame in frames
    ]


TRANSFORMATIONS = {
    "filterFieldsByName": _only, "joinByField": _joined, "merge": _merged, "sortBy": _sort_by, "organize": _organized,
}  # fmt: skip


def _sorted(rows: Table, name: str, *, descending: bool) -> Table:
    def key(row: Row) -> tuple[bool, Any]:
        cell = row.get(name)
        known = cell is not None and not (isinstance(cell, float) and math.isnan(cell))
        return known == descending, (cell if known else 0)

    return sorted(rows, key=key, reverse=descending)
