"""Render the runs as Prometheus text 0.0.4 or OpenMetrics 1.0.

Guarantees: one failing collector, or run, never loses the scrape; a family's lines are together, across runs, as both
formats demand; a run has no more series than its budget. Per-layer lines are one template a metric and run, built when
the run's layers change and filled by one ``%`` operation: a client object a series costs some twenty times as much.
Norms of layers have nine significant digits, which tell any two float32 apart.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from logging import getLogger
from typing import Any

import numpy as np
import numpy.typing as npt
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics import exposition as openmetrics_client

from gradiometer.exporter import build_labels
from gradiometer.metrics import CATALOGUE, Metric
from gradiometer.summary import LAYER_METRICS, Histogram, LayerSummary
from gradiometer.tail import Sample
from gradiometer_monitor.runs import Run, Runs

__all__ = ["OPENMETRICS", "TEXT", "Exposition", "negotiate"]

log = getLogger(__name__)

TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
STICKINESS = float(np.log(2.0))
"""A layer replaces a chosen one only when it is twice as far above its usual norm, so that noise moves no series."""

LABEL_SETS = 65_536
"""Label sets outside the layers that are kept as text: those of some thousand runs."""

Mask = npt.NDArray[np.bool_]
Lines = dict[str, list[str]]
Collect = Callable[[], Iterable[Sample]]


def negotiate(accept: str) -> str:
    """Choose the content type for an ``Accept`` header: OpenMetrics if it is preferred to plain text."""
    preferred = {TEXT: 0.0, OPENMETRICS: 0.0}
    for item in accept.split(","):
        kind, *parameters = (part.strip().lower() for part in item.split(";"))
        values = dict(part.split("=", 1) for part in parameters if "=" in part)
        if kind == "application/openmetrics-text" and values.get("version", "1.0.0") == "1.0.0":
            preferred[OPENMETRICS] = max(preferred[OPENMETRICS], _quality(values))
        elif kind in ("text/plain", "text/*", "*/*"):
            preferred[TEXT] = max(preferred[TEXT], _quality(values))
    return OPENMETRICS if preferred[OPENMETRICS] > preferred[TEXT] else TEXT


def _quality(parameters: dict[str, str]) -> float:
    try:
        return float(parameters.get("q", "1"))
    except ValueError:
        return 0.0


class Exposition:
    """The text of a scrape of ``runs``; safe to render from several threads, one of which renders at a time."""

    def __init__(self, runs: Runs, *, series_budget: int) -> None:
        self._runs, self._budget = runs, series_budget
        self._collectors: dict[str, Collect] = {}
        self._layers: dict[tuple[Any, ...], _LayerLines] = {}
        self._failing: set[str] = set()
        self._lock = threading.Lock()
        self._registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self._registry)

    def collect_from(self, collectors: Mapping[str, Collect]) -> None:
        """Take also the samples that these give, by name, at each scrape; another call replaces them."""
        self._collectors = dict(collectors)

    def change_budget(self, series_budget: int) -> None:
        """Keep each run to another budget, from the next scrape on."""
        with self._lock:
            if series_budget != self._budget:
                self._budget, self._layers = series_budget, {}

    def render(self, content_type: str = TEXT) -> bytes:
        """Render one scrape in ``content_type``, :data:`TEXT` or :data:`OPENMETRICS`."""
        openmetrics = content_type == OPENMETRICS
        lines: Lines = {name: [] for name in CATALOGUE}
        with self._lock:
            parts = [self._timed("process", lines, lambda: self._process_text(openmetrics)) or ""]
            self._timed("runs", lines, lambda: self._add_runs(lines))
            for name, collect in self._collectors.items():
                self._timed(name, lines, partial(_add_all, lines, collect))
            _add(lines, ("gradiometer_build_info", build_labels(), 1))
            self._report(lines, "poll", self._runs.poll_succeeded, self._runs.poll_seconds)
        for name, found in lines.items():
            if found:
                parts += (_header(CATALOGUE[name], openmetrics), *found)
        parts.append("# EOF\n" if openmetrics else "")
        return "".join(parts).encode("utf-8", "replace")

    def _timed(self, name: str, lines: Lines, collect: Callable[[], str]) -> str | None:
        """Run one collector, and report how long it took and whether it succeeded."""
        started, text = time.perf_counter(), None
        try:
            text = collect()
            self._failing.discard(name)
        except Exception:  # a collector that fails, for whatever reason, must not lose the scrape
            self._warn(name)
        self._report(lines, name, text is not None, time.perf_counter() - started)
        return text

    def _warn(self, name: str) -> None:
        if name not in self._failing:
            self._failing.add(name)
            log.exception("collector %s failed, and says so once until it succeeds", name)

    def _report(self, lines: Lines, collector: str, success: bool, seconds: float) -> None:
        _add(lines, ("gradiometer_collector_success", (collector,), int(success)))
        _add(lines, ("gradiometer_collector_seconds", (collector,), seconds))

    def _process_text(self, openmetrics: bool) -> str:
        if openmetrics:
            text = openmetrics_client.generate_latest(self._registry)  # type: ignore[no-untyped-call]
            return str(text, "utf-8").removesuffix("# EOF\n")
        return str(generate_latest(self._registry), "utf-8")

    def _add_runs(self, lines: Lines) -> str:
        """Add every run; raise an ExceptionGroup at the end if some could not be added."""
        errors = []
        with self._runs.snapshot(scrape=True) as runs:
            self._layers = {run.key: self._layers.get(run.key) or _LayerLines(run, self._budget) for run in runs}
            for run in runs:
                try:
                    self._add_run(lines, run)
                except Exception as error:  # the other runs must still be served
                    errors.append(error)
        if errors:
            raise ExceptionGroup("runs that could not be rendered", errors)
        return ""

    def _add_run(self, lines: Lines, run: Run) -> None:
        frame = run.frame()
        found: Lines = {name: [] for name in CATALOGUE}
        for sample in frame.samples:
            _add(found, sample)
        for name, histogram in frame.histograms.items():
            _add_histogram(found[name], name, frame.run_id, histogram)
        layers = self._layers[run.key]
        layers.choose(frame.layers, taken=sum(map(len, found.values())) + 1)
        for name, block in layers.render(frame.layers):
            found[name].append(block)
        _add(found, ("gradiometer_series_dropped_total", (frame.run_id,), layers.dropped))
        for name, added in found.items():
            lines[name] += added


class _LayerLines:
    """The per-layer lines of one run: which layers its budget lets in, and a template for each metric."""

    def __init__(self, run: Run, budget: int) -> None:
        names = run.ranks[0].manifest.layers
        self._labels = [_label_set(LAYER_METRICS[0], (run.run_id, name)).replace("%", "%%") for name in names]
        self._budget = budget
        self._chosen: Mask = np.zeros(len(names), np.bool_)
        self._blocks: dict[str, _Block] = {}
        self.dropped = 0
        """Series left out, summed over the scrapes so far."""

    def choose(self, layers: LayerSummary, taken: int) -> None:
        """Choose the layers to export, ``taken`` series of the budget being used: all of them if they fit.

        Otherwise those come first that were non-finite most often, and among equals those whose window maximum is
        furthest above their usual norm.
        """
        places = max(0, self._budget - taken) // len(layers.metrics)
        exported = layers.exported
        if np.count_nonzero(exported) <= places:
            self._chosen = exported.copy()
            return
        anomaly = layers.anomaly() + STICKINESS * self._chosen
        best = np.lexsort((-anomaly, -layers.nonfinite, ~exported))[:places]
        self._chosen = np.zeros(len(exported), np.bool_)
        self._chosen[best] = True
        self.dropped += len(layers.metrics) * int(np.count_nonzero(exported & ~self._chosen))

    def render(self, layers: LayerSummary) -> Iterable[tuple[str, str]]:
        """Yield the name and the lines of each metric that has any."""
        for name, (values, known) in layers.columns().items():
            shown = known & self._chosen
            if shown.any():
                yield name, self._block(name, shown).render(values[shown])

    def _block(self, name: str, shown: Mask) -> _Block:
        block = self._blocks.get(name)
        if block is None or not np.array_equal(block.shown, shown):
            form = "%d" if CATALOGUE[name].kind == "counter" else "%.9g"
            places = shown.nonzero()[0].tolist()
            template = "".join([f"{name}{self._labels[place]} {form}\n" for place in places])
            block = self._blocks[name] = _Block(shown=shown, template=template)
        return block


@dataclass(kw_only=True, slots=True)
class _Block:
    """The lines of one metric and run: a template with a place for each value, and the text it last became."""

    shown: Mask
    template: str
    numbers: npt.NDArray[Any] | None = None
    text: str = ""

    def render(self, numbers: npt.NDArray[Any]) -> str:
        """Fill the template; counters that did not move, and runs that are over, are not rendered again."""
        if self.numbers is None or not np.array_equal(self.numbers, numbers):
            text = self.template % tuple(numbers.tolist())
            self.numbers, self.text = numbers, text if np.isfinite(numbers).all() else _spell(text)
        return self.text


def _spell(text: str) -> str:
    """Write non-finite values as the formats do; a label cannot hold these strings, whose newlines it would escape."""
    return text.replace("} inf\n", "} +Inf\n").replace("} -inf\n", "} -Inf\n").replace("} nan\n", "} NaN\n")


def _header(metric: Metric, openmetrics: bool) -> str:
    name = metric.family if openmetrics else metric.name
    text = metric.help.replace("\\", r"\\").replace("\n", r"\n")
    text = text.replace('"', r"\"") if openmetrics else text
    return f"# HELP {name} {text}\n# TYPE {name} {metric.kind}\n"


def _label_set(name: str, values: tuple[str, ...], extra: str = "") -> str:
    pairs = [f'{label}="{_escape(value)}"' for label, value in zip(CATALOGUE[name].labels, values, strict=True)]
    return f"{{{','.join(pairs)}{extra}}}"


_labels = lru_cache(maxsize=LABEL_SETS)(_label_set)


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _number(value: float) -> str:
    if np.isfinite(value):
        return repr(value)
    return "NaN" if np.isnan(value) else "+Inf" if value > 0 else "-Inf"


def _add(lines: Lines, sample: Sample) -> None:
    name, labels, value = sample
    lines[name].append(f"{name}{_labels(name, labels)} {_number(value)}\n")


def _add_all(lines: Lines, collect: Collect) -> str:
    for sample in list(collect()):  # all of a collector's, or none
        _add(lines, sample)
    return ""


def _add_histogram(lines: list[str], name: str, run_id: str, histogram: Histogram) -> None:
    counts = histogram.cumulative
    for bound, count in zip([*histogram.bounds, float("inf")], counts, strict=True):
        le = f',le="{_number(bound)}"'
        lines.append(f"{name}_bucket{_labels(name, (run_id,), le)} {count}\n")
    labels = _labels(name, (run_id,))
    lines += (f"{name}_count{labels} {counts[-1]}\n", f"{name}_sum{labels} {_number(histogram.sum)}\n")
