"""Offer a run's metrics inside the training process, for those who want no daemon. Needs no torch.

    from gradiometer.exporter import collector
    REGISTRY.register(collector(agent))

Guarantees: collecting never raises, because that would lose the whole scrape: it is logged once and exported as
``gradiometer_collector_success 0``. A scrape costs the training process one metric object a series; for models of
thousands of layers the monitor, which is another process, is the better choice.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Iterable
from functools import cache
from logging import getLogger
from pathlib import Path
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from gradiometer.metrics import CATALOGUE, Metric
from gradiometer.records import RunFormatError, installed_version
from gradiometer.spread import SPREAD_OF, spread
from gradiometer.summary import Histogram
from gradiometer.tail import Frame, RankTail, frame, identity

__all__ = ["RunCollector", "build_labels", "collector"]

log = getLogger(__name__)

POLLS = 64
"""Bounded reads that one scrape makes at most to catch up with the ring."""


class HasPath(Protocol):
    """Anything that knows its rank directory: an Agent, an open run."""

    @property
    def path(self) -> Path: ...


RankDirectory = str | os.PathLike[str] | HasPath


def collector(*sources: RankDirectory) -> RunCollector:
    """Make the collector of agents, or of rank directories (``<root>/<run_id>/rank-00000``).

    One collector takes all the agents of a process: registering two would declare every metric twice.
    """
    return RunCollector(*sources)


class RunCollector(Collector):
    """A prometheus_client collector of one or several rank directories; safe to collect from several threads."""

    def __init__(self, *sources: RankDirectory) -> None:
        self._paths = list(dict.fromkeys(_rank_directory(source) for source in sources))
        self._tails: dict[Path, RankTail] = {}
        self._warned: set[Path] = set()
        self._lock = threading.Lock()

    def describe(self) -> Iterable[Family]:
        """Name the families without collecting; registering asks for them."""
        return [_family(metric) for metric in CATALOGUE.values()]

    def collect(self) -> Iterable[Family]:
        """Read what was written since the last scrape and return the families that have a value."""
        with self._lock:
            started = time.perf_counter()
            frames = [found for path in self._paths if (found := self._frame(path)) is not None]
            families = _families(frames)
            success = len(frames) == len(self._paths)
            _gauge(families, "gradiometer_build_info", build_labels(), 1)
            _gauge(families, "gradiometer_collector_success", ("exporter",), success)
            _gauge(families, "gradiometer_collector_seconds", ("exporter",), time.perf_counter() - started)
        return [family for family in families.values() if family.samples]

    def close(self) -> None:
        """Close the rings. A later scrape opens them again, and counts from the rows that they still hold."""
        with self._lock:
            for path in list(self._tails):
                self._forget(path)

    def _frame(self, path: Path) -> Frame | None:
        try:
            tail = self._follow(path)
            return frame([tail], "finished" if tail.finished else "running")
        except Exception as error:  # whatever it is, the process's other metrics must still be served
            self._forget(path)
            self._warn(path, error)
            return None

    def _follow(self, path: Path) -> RankTail:
        tail = self._tails.get(path)
        if tail is not None and tail.identity != identity(path):
            self._forget(path)
            tail = None
        if tail is None:
            tail = self._tails[path] = RankTail(path)
        for _ in range(POLLS):
            if not tail.poll():
                break
        return tail

    def _forget(self, path: Path) -> None:
        if tail := self._tails.pop(path, None):
            tail.close()

    def _warn(self, path: Path, error: Exception) -> None:
        if path not in self._warned:
            self._warned.add(path)
            expected = isinstance(error, (OSError, RunFormatError))
            log.warning("cannot export %s, and say so once: %s", path, error, exc_info=not expected)


@cache
def build_labels() -> tuple[str, str]:
    """Return the label values of ``gradiometer_build_info``: the version of gradiometer and of Python."""
    return installed_version(), platform.python_version()


def _rank_directory(source: RankDirectory) -> Path:
    return Path(source) if isinstance(source, (str, os.PathLike)) else Path(source.path)


def _family(metric: Metric) -> Family:
    match metric.kind:
        case "counter":
            return CounterMetricFamily(metric.family, metric.help, labels=metric.labels)
        case "histogram":
            return HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
        case "gauge":
            return GaugeMetricFamily(metric.name, metric.help, labels=metric.labels)


def _families(frames: list[Frame]) -> dict[str, Family]:
    families = {name: _family(metric) for name, metric in CATALOGUE.items()}
    for found in frames:
        for name, labels, value in found.samples:
            _gauge(families, name, labels, value)
        for name, histogram in found.histograms.items():
            _add_histogram(families[name], found.run_id, histogram)
        _add_layers(families, found)
    return families


def _gauge(families: dict[str, Family], name: str, labels: tuple[str, ...], value: float) -> None:
    """Add one sample of a gauge or a counter, which are named alike."""
    families[name].add_sample(name, dict(zip(CATALOGUE[name].labels, labels, strict=True)), value)


def _add_histogram(family: Family, run_id: str, histogram: Histogram) -> None:
    assert isinstance(family, HistogramMetricFamily)
    bounds = [*map(floatToGoString, histogram.bounds), "+Inf"]
    family.add_metric([run_id], list(zip(bounds, histogram.cumulative, strict=True)), sum_value=histogram.sum)


def _add_layers(families: dict[str, Family], found: Frame) -> None:
    columns = found.layers.columns()
    peaks, measured = columns[SPREAD_OF]
    for name, labels, value in spread(found.run_id, peaks[measured]):
        _gauge(families, name, labels, value)
    for name, (values, known) in columns.items():
        for place in known.nonzero()[0].tolist():
            _gauge(families, name, (found.run_id, found.layers.names[place]), values[place])
