"""What a scrape costs: client objects, a collector that yields families, and the monitor's cached templates.

Each serves the three per-layer metrics of one run. The client's side renders them alone; the monitor's side is its
whole scrape, with the run's other series and its own. What it costs to take the values in is counted on neither side,
but as the monitor renders nothing again that has not changed, the run makes a step before each of its scrapes.

    python -m benchmarks.exposition [--rounds N] [--json FILE]
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from benchmarks._measure import arguments, compare, report, write_json
from benchmarks.ring import ROW, manifest
from gradiometer.recorder import Recorder
from gradiometer.summary import LAYER_METRICS
from gradiometer_monitor.exposition import Exposition
from gradiometer_monitor.runs import Runs

SERIES = (1000, 10_000, 100_000)


def client_objects(layers: int) -> Callable[[], object]:
    """Return a call that renders client gauges, whose children are cached and whose setting is not counted."""
    registry = CollectorRegistry()
    for name in LAYER_METRICS:
        family = Gauge(name, name, ["run_id", "layer"], registry=registry)
        for layer in range(layers):
            family.labels("bench", f"blocks.{layer}").set(layer / 7)
    return lambda: generate_latest(registry)


class Families(Collector):
    """A collector that makes its families anew at each scrape."""

    def __init__(self, layers: int) -> None:
        self._values = np.arange(layers) / 7
        self._names = [f"blocks.{layer}" for layer in range(layers)]

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """Yield one family a metric."""
        for name in LAYER_METRICS:
            family = GaugeMetricFamily(name, name, labels=["run_id", "layer"])
            for layer, value in zip(self._names, self._values.tolist(), strict=True):
                family.add_metric(["bench", layer], value)
            yield family


def families(layers: int) -> Callable[[], object]:
    """Return a call that renders the families of a collector."""
    registry = CollectorRegistry()
    registry.register(Families(layers))
    return lambda: generate_latest(registry)


def monitor(root: Path, layers: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return a call that renders the monitor's whole scrape, and one that makes a step and reads it."""
    recorder = Recorder(root, manifest(layers))
    recorder.stats[:] = np.random.default_rng(0).random(recorder.stats.shape, np.float32)
    runs = Runs(root, retention_seconds=1e12)

    def step() -> None:
        recorder.stats *= np.float32(1.0001)
        recorder.commit(ROW)
        runs.poll()

    return Exposition(runs, series_budget=10_000_000).render, step


def main() -> None:
    """Compare at each number of series."""
    options = arguments(__doc__)
    results = {}
    for series in SERIES:
        layers = series // len(LAYER_METRICS)
        with tempfile.TemporaryDirectory() as root:
            render, step = monitor(Path(root), layers)
            calls = {
                "client objects": client_objects(layers),
                "collector yielding families": families(layers),
                "cached templates": render,
            }
            before = {"cached templates": step}
            results[str(series)] = compare(calls, rounds=options.rounds, baseline="client objects", before=before)
        report(f"{series} series", results[str(series)])
    write_json(options.json, results, benchmark="exposition")


if __name__ == "__main__":
    main()
