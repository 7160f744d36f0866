"""Lay out the screen: the list of runs, one run, and the help, each exactly as large as the terminal."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from rich.text import Text

from gradiometer.tail import RunState
from gradiometer_monitor.top.draw import UNICODE, Glyphs, age, bar, chart, fit, number, peaks, spark
from gradiometer_monitor.top.follower import Snapshot
from gradiometer_monitor.top.view import Incident, LayerLine, RunLine, RunView

__all__ = ["SORTS", "State", "chosen", "render"]

STATES: dict[RunState, str] = {"running": "green", "finished": "dim", "lost": "bold red"}
FIRST = ("running", "lost", "finished")
"""What needs attention comes first, as on the page."""
SORTS: dict[str, Callable[[RunLine], tuple[float | str, ...]]] = {
    "newest": lambda line: (FIRST.index(line.state), -line.created),
    "name": lambda line: (line.run_id,),
    "ratio": lambda line: (-(line.ratio or 0.0),),
    "non-finite": lambda line: (-line.nonfinite_steps,),
    "age": lambda line: (-(line.updated or 0.0),),
}
SMALLEST = (20, 5)
HIGH, VERY_HIGH = 3.0, 10.0
"""Times the usual norm from which a number is yellow, and red."""
HELP = (
    "up, down, j, k   choose a run, or move through the layers",
    "enter, right     look at the chosen run",
    "esc, left        back to the list",
    "s                sort by the next column",
    "/                show only runs whose name has what you type; esc ends it",
    "p, space         pause; the runs are followed all the same",
    "?                this help",
    "q                leave",
    "",
    "norm    L2 norm of all gradients before clipping, newest step",
    "times   that norm over the usual one, the median of 512 steps",
    "clip    share of the steps of the last minute that were clipped",
    "bad     steps with a gradient that was NaN or infinite",
    "age     time since the newest step",
)


@dataclass(slots=True)
class State:
    """What the user has chosen."""

    mode: Literal["runs", "run", "help"] = "runs"
    selected: str | None = None
    """The run that the cursor is on."""
    sort: str = "newest"
    filter: str = ""
    typing: bool = False
    paused: bool = False
    first_layer: int = 0
    glyphs: Glyphs = field(default=UNICODE)


@dataclass(frozen=True, slots=True)
class _Column:
    heading: str
    width: int
    show: Callable[[RunLine, float], str]
    importance: int
    """Columns of little importance leave first where there is no room."""
    style: Callable[[RunLine], str] = lambda _: ""


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _unusual(ratio: float | None) -> str:
    return "bold red" if ratio is not None and ratio >= VERY_HIGH else "yellow" if ratio and ratio >= HIGH else ""


COLUMNS = (
    _Column("state", 8, lambda line, _: line.state, 9, lambda line: STATES[line.state]),
    _Column("step", 9, lambda line, _: number(line.step, 9), 8),
    _Column("steps/s", 7, lambda line, _: number(line.steps_per_second), 3),
    _Column("norm", 9, lambda line, _: number(line.grad_norm, 4), 7, lambda line: _unusual(line.ratio)),
    _Column("usual", 9, lambda line, _: number(line.baseline, 4), 1),
    _Column("times", 6, lambda line, _: number(line.ratio, 2), 6, lambda line: _unusual(line.ratio)),
    _Column("loss", 8, lambda line, _: number(line.loss, 4), 5),
    _Column("clip", 5, lambda line, _: _percent(line.clip_ratio), 2),
    _Column("bad", 5, lambda line, _: str(line.nonfinite_steps), 4, lambda line: "red" if line.nonfinite_steps else ""),
    _Column("age", 5, lambda line, now: "-" if line.updated is None else age(now - line.updated), 5),
)
NAME_WIDTH = 20
"""Least width of a run's name, for which columns are left out."""


def chosen(state: State, snapshot: Snapshot) -> list[RunLine]:
    """Return the runs that the filter lets through, in order."""
    found = [line for line in snapshot.lines if state.filter.lower() in line.run_id.lower()]
    return sorted(found, key=lambda line: (*SORTS[state.sort](line), line.run_id))


def render(state: State, snapshot: Snapshot, width: int, height: int, *, cursor: bool = True) -> list[Text]:
    """Lay out the whole screen: ``height`` lines, none wider than ``width`` cells."""
    if width < SMALLEST[0] or height < SMALLEST[1]:
        return [Text("too small"[:width])]
    if state.mode == "help":
        body = [Text(fit(line, width, state.glyphs)) for line in ("gradiometer top", "", *HELP)]
    elif state.mode == "run" and snapshot.view is not None:
        body = _run(state, snapshot.view, width, height - 1)
    elif state.mode == "run":
        body = [Text(fit(f"run {state.selected}: not there, or not readable", width, state.glyphs))]
    else:
        body = _runs(state, snapshot, width, height - 1, cursor=cursor)
    body = body[: height - 1] + [Text("")] * (height - 1 - len(body))
    for line in body:
        line.truncate(width)  # in a narrow terminal the columns of a layer do not all have room
    return [*body, _footer(state, snapshot, width)]


def _footer(state: State, snapshot: Snapshot, width: int) -> Text:
    if state.typing:
        return Text(fit(f"/{state.filter}_", width, state.glyphs), style="bold")
    keys = {"runs": "enter look  s sort  / filter", "run": "esc back  j k layers", "help": "esc back"}[state.mode]
    said = [f"{keys}  p pause  ? help  q quit", f"sorted by {state.sort}" if state.mode == "runs" else ""]
    said += [f"filter {state.filter!r}" if state.filter else "", "PAUSED" if state.paused else "", snapshot.error]
    return Text(fit("  ".join(filter(None, said)), width, state.glyphs), style="reverse")


def _runs(state: State, snapshot: Snapshot, width: int, height: int, *, cursor: bool) -> list[Text]:
    lines, now = chosen(state, snapshot), time.time()
    columns = _fitting(width)
    name = width - 2 - sum(column.width + 1 for column in columns)
    heading = "  " + fit("run", name, state.glyphs)
    heading += "".join(" " + fit(column.heading, column.width, state.glyphs, right=True) for column in columns)
    states = [line.state for line in snapshot.lines]
    counts = ", ".join(f"{states.count(each)} {each}" for each in STATES)
    unreadable = f", {snapshot.unreadable} unreadable" if snapshot.unreadable else ""
    shown = [Text(fit(f"gradiometer top   {counts}{unreadable}", width, state.glyphs), style="bold")]
    shown.append(Text(heading, style="underline"))
    place = next((at for at, line in enumerate(lines) if line.run_id == state.selected), 0)
    rows = max(1, height - len(shown))
    first = max(0, min(place - rows // 2, len(lines) - rows))
    for at, line in enumerate(lines[first : first + rows], first):
        shown.append(_run_line(state, line, columns, name, now, current=cursor and at == place))
    if not lines:
        reading = "reading the runs" if not snapshot.ready else "no runs yet" if not snapshot.lines else "no run fits"
        shown.append(Text(fit(f"  {reading}", width, state.glyphs), style="dim"))
    return shown


def _fitting(width: int) -> list[_Column]:
    columns = list(COLUMNS)
    while columns and width - 2 - sum(column.width + 1 for column in columns) < NAME_WIDTH:
        columns.remove(min(columns, key=lambda column: column.importance))
    return columns


def _run_line(state: State, line: RunLine, columns: list[_Column], name: int, now: float, *, current: bool) -> Text:
    text = Text(f"{state.glyphs.mark} " if current else "  ")
    text.append(fit(line.run_id, name, state.glyphs))
    for column in columns:
        cell = fit(column.show(line, now), column.width, state.glyphs, right=True)
        text.append(" " + cell, style=column.style(line))
    if current:
        text.stylize("reverse")
    return text


def _run(state: State, view: RunView, width: int, height: int) -> list[Text]:
    glyphs, room = state.glyphs, height - 8
    charted = max(2, min(10, room * 3 // 10))
    incidents = max(1, min(len(view.incidents) or 1, room * 3 // 10))
    layers = max(1, room - charted - incidents)
    shown = _head(view, width, glyphs)
    lines = chart(view.norms, width, charted, glyphs, view.threshold)
    shown += [Text(fit(line, width, glyphs)) for line in lines]
    shown.append(_marks(view, width, glyphs))
    shown.append(Text(_layer_heading(width, glyphs), style="underline"))
    first = max(0, min(state.first_layer, len(view.layers) - layers))
    shown += [_layer(layer, width, glyphs) for layer in view.layers[first : first + layers]]
    title = f"incidents ({len(view.incidents)})" if view.incidents else "no incidents"
    shown.append(Text(fit(title, width, glyphs), style="underline"))
    shown += [_incident(each, width, glyphs) for each in view.incidents[:incidents]]
    return shown


def _head(view: RunView, width: int, glyphs: Glyphs) -> list[Text]:
    line = view.line
    last = "no step yet" if line.updated is None else f"step {line.step}, {age(time.time() - line.updated)} ago"
    ranks = f", {line.ranks} ranks" if line.ranks > 1 else ""
    title = Text(fit(f"{line.run_id}  {line.state}{ranks}, {last}", width, glyphs), style="bold")
    times = f"{number(line.ratio, 2)}{glyphs.times}" if line.ratio is not None else "-"
    norm = f"norm {number(line.grad_norm, 4)}  usual {number(line.baseline, 4)}  {times}"
    clip = f"threshold {number(view.threshold, 4)}  clipped {_percent(line.clip_ratio)}"
    bad = f"non-finite {line.nonfinite_steps}  skipped {line.skipped_steps}"
    speed = (
        f"loss {number(line.loss, 4)}  lr {number(line.learning_rate)}  {number(line.steps_per_second)} steps/s  {bad}"
    )
    texts = [Text(fit(f"{norm}  {clip}", width, glyphs), style=_unusual(line.ratio)), Text(fit(speed, width, glyphs))]
    return [title, *texts, Text(fit(f"policy {view.policy}", width, glyphs))]


def _marks(view: RunView, width: int, glyphs: Glyphs) -> Text:
    """Mark below the chart in which steps the gradients were clipped (^) or not finite (!)."""
    plot = max(1, width - 10)
    bad, clipped = (peaks(each.astype(np.float64), plot) for each in (view.nonfinite, view.clipped))
    cells = "".join("!" if b else "^" if c else " " for b, c in zip(bad, clipped, strict=True))
    scale = f"{len(view.steps)} st."
    return Text(fit(f"{scale:>8}  {cells.rjust(plot)}", width, glyphs), style="magenta")


def _name_width(width: int) -> int:
    return max(10, min(48, width - 52))


def _layer_heading(width: int, glyphs: Glyphs) -> str:
    cells = [fit("layer", _name_width(width), glyphs)]
    cells += [fit(each, size, glyphs, right=True) for each, size in (("norm", 9), ("times", 6), ("bad", 5))]
    return fit(" ".join([*cells, fit("share", 8, glyphs), "course"]), width, glyphs)


def _layer(layer: LayerLine, width: int, glyphs: Glyphs) -> Text:
    ratio = None if np.isnan(layer.ratio) else layer.ratio
    text = Text(fit(layer.name, _name_width(width), glyphs))
    text.append(" " + fit(number(layer.last, 4), 9, glyphs, right=True), style=_unusual(ratio))
    text.append(" " + fit(number(ratio, 2), 6, glyphs, right=True), style=_unusual(ratio))
    text.append(" " + fit(str(layer.nonfinite), 5, glyphs, right=True), style="red" if layer.nonfinite else "")
    text.append(" " + bar(layer.share, 8, glyphs), style="cyan")
    room = width - _name_width(width) - 33
    if layer.trend and room > 12:
        text.append(" " + fit(layer.trend, 9, glyphs), style="bold red")
        room -= 10
    text.append(" " + spark(layer.norms, max(1, room), glyphs))
    return text


def _incident(incident: Incident, width: int, glyphs: Glyphs) -> Text:
    when = time.strftime("%H:%M:%S", time.localtime(incident.time))
    step = "" if incident.step is None else f" step {incident.step}"
    rank = f" rank {incident.rank}" if incident.rank else ""
    style = "red" if incident.kind == "nonfinite" else ""
    return Text(fit(f"{when}{step}{rank} {incident.kind}: {incident.message}", width, glyphs), style=style)
