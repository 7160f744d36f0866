"""A day of a run, scraped every 15 s: one-step spikes are on the peak panels however far out one zooms."""

from __future__ import annotations

import math
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from gradiometer.recorder import Recorder
from gradiometer.tail import RankTail, frame
from gradiometer_dashboards import load
from gradiometer_dashboards.evaluation import Prometheus, Series, View
from gradiometer_monitor.exposition.layer_lines import LayerLines
from gradiometer_monitor.exposition.lines import line
from tests._dashboards import NAMES, Target, every_target, targets
from tests._ports import free_ports
from tests._receivers import prometheus

if TYPE_CHECKING:
    from tests.conftest import Append, MakeManifest, Spawn, WaitUntil

pytestmark = [pytest.mark.native, pytest.mark.slow]

Json = dict[str, Any]
RUN, END, DAY, SCRAPE, STEP = "day", 1_700_049_600, 86_400, 15, 3
LAYERS = ("embed", "blocks.0", "blocks.1", "head")
SPIKES = {
    51: "head", 612: "embed", 1806: "blocks.1", 4101: "head", 9972: "blocks.0", 15_021: "embed", 20_013: "head",
    30_561: "blocks.1", 41_334: "embed", 52_671: "head", 61_002: "blocks.0", 70_002: "blocks.1", 83_118: "embed",
}  # fmt: skip
"""Seconds before the end, at which one step of one layer was a spike."""
ZOOMS = {"1 h": 3600, "6 h": 6 * 3600, "24 h": DAY}
WIDE, NARROW = 1440, 480
"""Pixels of the screen: on a narrow one the points of a day are further apart than the window of the maxima is long."""


def _steps(first: int, count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Make the norms of each layer in steps of which the first is so many seconds before the end, [T, L]."""
    ago = first - STEP * np.arange(count)
    norms = 1.0 + 0.2 * np.sin(ago[:, None] * (1.0 + np.arange(len(LAYERS))))
    for place, each in enumerate(ago.tolist()):
        if each in SPIKES:
            norms[place, LAYERS.index(SPIKES[each])] = 500.0
    return norms


def _scrapes(root: Path, make_manifest: MakeManifest, append: Append) -> Iterator[tuple[int, str]]:
    """Write the day, and yield time and text of each scrape: the summary's and the exposition's own code, on its clock.

    What the boards of a run and of its layers name is scraped, without histograms.
    """
    manifest = make_manifest(RUN, layers=LAYERS, capacity=64, created_ns=(END - DAY) * 10**9)
    recorder, wanted = Recorder(root, manifest), {name for board in ("run", "layers") for name in _metrics(board)}
    tail, lines = RankTail(root / RUN / "rank-00000"), LayerLines(RUN, LAYERS)
    for first in range(DAY, 0, -SCRAPE):
        times = [(END - first + second) * 10**9 for second in range(0, SCRAPE, STEP)]
        append(recorder, _steps(first, SCRAPE // STEP), time_ns=times)
        tail.poll()
        found = frame([tail], "running")
        text = [line(sample) for sample in found.samples if sample[0] in wanted]
        text += [block for name, block in lines.render(lines.take(found.layers, 1000)) if name in wanted]
        yield END - first + SCRAPE, "".join(text)
    recorder.close()
    tail.close()


def _metrics(board: str) -> set[str]:
    if board not in NAMES:
        return set()
    asked = {name for target in targets(board) for name in target.metrics}
    return asked | {"gradiometer_run_info", "gradiometer_last_step_timestamp_seconds", "gradiometer_grad_norm_last"}


@pytest.fixture(scope="module")
def database(
    tmp_path_factory: pytest.TempPathFactory,
    native_binary: Callable[[str], str],
    shared_spawn: Spawn,
    wait_until: WaitUntil,
    make_manifest: MakeManifest,
    append: Append,
) -> Prometheus:
    """Give a Prometheus that holds the day, as if it had scraped it."""
    side, root = tmp_path_factory.mktemp("day"), tmp_path_factory.mktemp("runs")
    with (side / "day.txt").open("w") as file:
        for time, text in _scrapes(root, make_manifest, append):
            for sample in text.splitlines():
                labelled = sample.replace("{", '{job="gradiometer",instance="h1:9477",', 1)
                file.write(f"{labelled} {time}\n")
        file.write("# EOF\n")
    command: list[str | Path] = [
        native_binary("promtool"),
        "tsdb",
        "create-blocks-from",
        "openmetrics",
        side / "day.txt",
        side / "tsdb",
    ]
    subprocess.run(command, check=True, timeout=600, stdout=subprocess.DEVNULL)
    made = prometheus(native_binary("prometheus"), side, free_ports(1)[0], shared_spawn, wait_until)
    made.command.append("--storage.tsdb.retention.time=100y")
    made.start()
    return Prometheus(url=made.url)


def _view(database: Prometheus, board: str, seconds: int, width: int) -> View:
    chosen = {"run_id": RUN}
    return View(dashboard=load(board), prometheus=database, start=END - seconds, end=END, chosen=chosen, width=width)


def _is_peak(target: Target) -> bool:
    """Whether a graph or a heatmap draws norms' rolling maxima as they are."""
    drawn = "max_over_time" in target.expr and "[$__interval]" in target.expr and "/" not in target.expr
    return drawn and "_window_max" in target.expr and target.panel["type"] in ("timeseries", "heatmap")


PEAKS = [each for each in every_target() if each.values[0].board in ("run", "layers") and _is_peak(each.values[0])]


def _seen(series: Sequence[Series], ago: int, layer: str, interval: float) -> bool:
    """Tell whether a spike is on a graph: above all that is no spike, and first within a scrape and an interval."""
    found = [each for each in series if each.labels.get("layer", layer) == layer]
    return any(_is_on(each, ago, interval) for each in found)


def _is_on(series: Series, ago: int, interval: float) -> bool:
    limits = [(END - each, END - each + 90 + interval + SCRAPE) for each in SPIKES]
    usual = [
        value
        for time, value in zip(series.times, series.values, strict=True)
        if not any(first <= time <= last for first, last in limits)
    ]
    limit, begin = max(usual, default=-math.inf), END - ago
    above = [t for t, value in zip(series.times, series.values, strict=True) if value > limit + 0.1 and t >= begin]
    return bool(above) and above[0] <= begin + SCRAPE + interval


def _asked(view: View, target: Target, expr: str) -> tuple[list[Series], float]:
    panel = {**target.panel, "targets": [{**target.target, "expr": expr}]}
    (answer,) = view.answers(panel)
    return answer.series, view.interval(panel)


def _missed(view: View, target: Target, seconds: int, expr: str) -> list[int]:
    series, interval = _asked(view, target, expr)
    # A spike whose first point may lie outside the view at its edges is not looked for.
    looked_for = {ago: layer for ago, layer in SPIKES.items() if SCRAPE + interval <= ago <= seconds - interval}
    return [ago for ago, layer in looked_for.items() if not _seen(series, ago, layer, interval)]


@cache
def _naive(expr: str, *, window: bool) -> str:
    """Ask for the value of the newest step instead of the window's, or of the window's without its peak."""
    plain = re.sub(r"max_over_time\((\w+\{[^}]*\})\[\$__interval\]\)", r"\1", expr)
    return plain if window else re.sub("(_finite)?_window_max", "_last", plain)


@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize("zoom", ZOOMS)
@pytest.mark.parametrize("target", PEAKS)
def test_every_spike_is_on_the_peak_panels(target: Target, zoom: str, width: int, database: Prometheus) -> None:
    """No spike of a single step is missed, nor seen late by more than a scrape and a point of the graph."""
    view = _view(database, target.board, ZOOMS[zoom], width)
    assert _missed(view, target, ZOOMS[zoom], target.expr) == []


@pytest.mark.parametrize("target", PEAKS)
def test_other_queries_would_miss_spikes(target: Target, database: Prometheus) -> None:
    """The newest value shows few of the spikes, and the rolling maximum alone not all of them over a day."""
    view = _view(database, target.board, DAY, NARROW)
    assert len(_missed(view, target, DAY, _naive(target.expr, window=False))) > len(SPIKES) // 2
    assert _missed(view, target, DAY, _naive(target.expr, window=True))


def test_there_are_peak_panels() -> None:
    """The dashboards of a run and of its layers have panels whose queries keep peaks."""
    assert {each.values[0].board for each in PEAKS} == {"run", "layers"} & set(NAMES)
    assert {each.values[0].panel["type"] for each in PEAKS} == {"timeseries", "heatmap"}
