"""Render the runs as Prometheus text 0.0.4 or OpenMetrics 1.0.

Guarantees: one failing or hanging collector, or failing run, never loses the scrape; a family's lines are together,
across runs, as both formats demand; the layers of a run, and those of all runs together, are kept within budgets. The
lock of the runs is held while numbers are copied, and not while text is made of them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics import exposition as openmetrics_client

from gradiometer.exporter import build_labels
from gradiometer.metrics import CATALOGUE, SCRAPE_SECONDS_BUCKETS
from gradiometer.summary import Histogram
from gradiometer.tail import Beside, Frame, Sample
from gradiometer_monitor.exposition.collectors import Answer, Asked
from gradiometer_monitor.exposition.health import RequestCounts
from gradiometer_monitor.exposition.layer_lines import RUN_SAMPLES, LayerLines, LayerValues, share
from gradiometer_monitor.exposition.lines import Counts, Lines, add, add_histogram, header, line
from gradiometer_monitor.following.runs import Run, Runs

__all__ = ["OPENMETRICS", "TEXT", "TOTAL_SERIES", "Exposition", "LayersOf"]

TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
TOTAL_SERIES = 200_000
"""Series of all runs together in one scrape, unless the settings say otherwise: some 20 MB of text."""
COLLECT_SECONDS = 4.0
"""How long a scrape waits for its collectors, all together: well below Prometheus' usual limit of 10 s for a scrape."""

LayersOf = Literal["all", "lead", "none"]
"""Runs whose layers are in a scrape: all, those whose rank 0 is followed here, or none."""

Collect = Callable[[], Iterable[Sample]]
Line = tuple[str, str]
"""Name in the catalogue, and the line of one sample."""
Result = TypeVar("Result")


class Exposition:
    """The text of a scrape of ``runs``; safe to render from several threads, one of which renders at a time.

    A run has at most ``series_budget`` series, and all runs together at most ``total_series``: layers are left out
    beyond that, nothing else is. ``layers`` says of which runs there are any.
    """

    def __init__(
        self, runs: Runs, *, series_budget: int, total_series: int = TOTAL_SERIES, layers: LayersOf = "all"
    ) -> None:
        self._runs, self._budget, self._total, self._layers_of = runs, series_budget, total_series, layers
        self._layers: dict[tuple[Any, ...], LayerLines] = {}
        self._lock = threading.Lock()
        self._seconds, self._bytes = Histogram(SCRAPE_SECONDS_BUCKETS), 0
        self._registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self._registry)
        self._process = [Asked("process", partial(self._process_text, openmetrics)) for openmetrics in (False, True)]
        self._taking = Asked("runs", self._take)
        self.requests = RequestCounts()
        """Requests that were answered; kept here, as the application is made anew by a reload."""
        self._own: dict[str, Asked[list[Line]]] = {}
        self.watch("requests", self.requests.samples)
        self._others: dict[str, Asked[list[Line]]] = {}

    def watch(self, name: str, collect: Collect) -> None:
        """Take also the samples that ``collect`` gives, at each scrape for good; ``name`` is that of the collector."""
        self._own = {**self._own, name: Asked(name, partial(_lines, collect))}

    def collect_from(self, collectors: Mapping[str, Collect]) -> None:
        """Take also the samples that these give, by name, at each scrape; another call replaces them."""
        self._others = {name: Asked(name, partial(_lines, collect)) for name, collect in collectors.items()}

    def change_budgets(self, series_budget: int, total_series: int, layers: LayersOf) -> None:
        """Keep to other budgets, of each run and of all, and show other layers, from the next scrape on."""
        with self._lock:
            self._budget, self._total, self._layers_of = series_budget, total_series, layers

    def render(self, content_type: str = TEXT) -> bytes:
        """Render one scrape in ``content_type``, :data:`TEXT` or :data:`OPENMETRICS`."""
        openmetrics = content_type == OPENMETRICS
        with self._lock:
            started = time.perf_counter()
            lines: Lines = {name: [] for name in CATALOGUE}
            parts = [self._collect(lines, openmetrics)]
            for name, found in lines.items():
                if found:
                    parts += (header(CATALOGUE[name], openmetrics), *found)
            parts.append("# EOF\n" if openmetrics else "")
            body = "".join(parts).encode()
            self._bytes = len(body)
            self._seconds.observe(np.array([time.perf_counter() - started]))
        return body

    def _collect(self, lines: Lines, openmetrics: bool) -> str:
        """Ask every collector at once and add what each answers; return the text of the process's own metrics."""
        process, others = self._process[openmetrics], (self._own | self._others).values()
        deadline = time.monotonic() + COLLECT_SECONDS
        self._taking.begin()
        for other in others:
            other.begin()
        text = process.ask()
        _report(lines, process, text)
        self._add_runs(lines, self._taking.finish(deadline))
        for other in others:
            answer = other.finish(deadline)
            for name, text_line in answer.found or ():
                lines[name].append(text_line)
            _report(lines, other, answer)
        self._add_own(lines)
        return text.found or ""

    def _add_own(self, lines: Lines) -> None:
        """Add what the monitor says of itself."""
        poll = ("poll",)
        samples: list[Sample] = [
            ("gradiometer_build_info", build_labels(), 1),
            ("gradiometer_collector_success", poll, int(self._runs.poll_succeeded)),
            ("gradiometer_collector_seconds", poll, self._runs.poll_seconds),
            ("gradiometer_scrape_size_bytes", (), self._bytes),
        ]
        add(lines, samples)
        add_histogram(lines, "gradiometer_scrape_seconds", (), Counts.of(self._seconds))

    def _process_text(self, openmetrics: bool) -> str:
        if openmetrics:
            text = openmetrics_client.generate_latest(self._registry)  # type: ignore[no-untyped-call]
            return str(text, "utf-8").removesuffix("# EOF\n")
        return str(generate_latest(self._registry), "utf-8")

    def _take(self) -> _Snapshot:
        """Copy what the scrape shows of every run, holding the lock of the runs."""
        found = _Snapshot()
        with self._runs.snapshot(scrape=True) as runs:
            self._layers = {run.key: self._layers.get(run.key) or _layer_lines(run) for run in runs}
            frames = [(run, frame) for run in runs if (frame := found.attempt(run.frame)) is not None]
            sizes = [_series(frame, self._shows_layers(run)) for run, frame in frames]
            most = share([min(self._budget, sum(size)) for size in sizes], self._total)
            for (run, frame), (fixed, _) in zip(frames, sizes, strict=True):
                places = min(self._budget, most) - fixed if self._shows_layers(run) else None
                take = partial(_taken, frame, self._layers[run.key], places)
                if (taken := found.attempt(take)) is not None:
                    found.runs.append(taken)
        return found

    def _shows_layers(self, run: Run) -> bool:
        return self._layers_of == "all" or (self._layers_of == "lead" and run.ranks[0].rank == 0)

    def _add_runs(self, lines: Lines, answer: Answer[_Snapshot]) -> None:
        """Add every run, or nothing of one that fails."""
        started, snapshot = time.perf_counter(), answer.found or _Snapshot()
        for taken in snapshot.runs:
            for name, found in (snapshot.attempt(partial(_run_lines, taken)) or {}).items():
                lines[name] += found
        if snapshot.errors:
            answer.error = ExceptionGroup("runs that could not be rendered", snapshot.errors)
        answer.seconds += time.perf_counter() - started
        _report(lines, self._taking, answer)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Taken:
    """What a scrape shows of one run, copied."""

    run_id: str
    samples: list[Sample]
    beside: Beside | None
    histograms: dict[str, Counts]
    lines: LayerLines
    layers: LayerValues


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """What a scrape shows of all runs, and what was wrong with those that it does not show."""

    runs: list[_Taken] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)

    def attempt(self, call: Callable[[], Result]) -> Result | None:
        try:
            return call()
        except Exception as error:  # the other runs must still be served
            self.errors.append(error)
            return None


def _layer_lines(run: Run) -> LayerLines:
    return LayerLines(run.run_id, run.ranks[0].manifest.layers)


def _series(frame: Frame, shows_layers: bool) -> tuple[int, int]:
    """Count the series of a run that are not of layers, and those of its layers."""
    histograms = sum(len(histogram.bounds) + 3 for histogram in frame.histograms.values())
    layers = int(np.count_nonzero(frame.layers.exported)) * len(frame.layers.metrics) * shows_layers
    beside = 0 if frame.beside is None else frame.beside.series
    return len(frame.samples) + beside + histograms + RUN_SAMPLES, layers


def _taken(frame: Frame, lines: LayerLines, places: int | None) -> _Taken:
    return _Taken(
        run_id=frame.run_id,
        samples=frame.samples,
        beside=frame.beside,
        histograms={name: Counts.of(histogram) for name, histogram in frame.histograms.items()},
        lines=lines,
        layers=lines.take(frame.layers, places),
    )


def _run_lines(taken: _Taken) -> Lines:
    found: Lines = {name: [] for name in CATALOGUE}
    add(found, taken.samples)
    add(found, () if taken.beside is None else taken.beside.samples())
    for name, counts in taken.histograms.items():
        add_histogram(found, name, (taken.run_id,), counts)
    for name, block in taken.lines.render(taken.layers):
        found[name].append(block)
    add(found, taken.lines.samples(taken.layers))
    return found


def _lines(collect: Collect) -> list[Line]:
    """Write the samples of a collector: all of them, or none if one is not as the catalogue says."""
    return [(sample[0], line(sample)) for sample in collect()]


def _report(lines: Lines, asked: Asked[Any], answer: Answer[Any]) -> None:
    """Say how long a collector took and whether it succeeded."""
    asked.tell(answer.error)
    labels = (asked.name,)
    samples: list[Sample] = [
        ("gradiometer_collector_success", labels, int(answer.error is None)),
        ("gradiometer_collector_seconds", labels, answer.seconds),
    ]
    add(lines, samples)
