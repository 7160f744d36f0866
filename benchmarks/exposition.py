"""What a scrape costs: client objects, a collector that yields families, and the monitor's cached templates.

Each serves the three per-layer metrics of one run. The client's side renders them alone; the monitor's side is its
whole scrape, with the run's other series and its own. What it costs to take the values in is counted on neither side,
but as the monitor renders nothing again that has not changed, the run makes a step before each of its scrapes. Of the
monitor alone it prints the CPU time, with and without gzip, and the memory: the peak of one scrape, and what the whole
process has more than before it followed the run.

    python -m benchmarks.exposition [--rounds N] [--json FILE] [--quick]
"""

from __future__ import annotations

import gzip
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path

import cramjam
import numpy as np
import psutil
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from benchmarks._measure import arguments, compare, report, write_json
from benchmarks.ring import ROW, manifest
from gradiometer.recorder import Recorder
from gradiometer.summary import LAYER_METRICS
from gradiometer.windows import WARMUP_STEPS
from gradiometer_monitor.exposition.exposition import Exposition
from gradiometer_monitor.following.runs import Runs
from gradiometer_monitor.web.scrape import GZIP_LEVEL

SERIES = (1000, 10_000, 100_000)
MANY = 200
"""Runs of one host, in the case of many."""

Details = dict[str, float]


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


def monitor(root: Path, layers: int, runs: int = 1) -> tuple[Exposition, Callable[[], None]]:
    """Return the exposition of a monitor of ``runs`` runs, and a call that makes a step in each and reads it."""
    made = [manifest(layers).model_copy(update={"run_id": f"run-{place}"}) for place in range(runs)]
    recorders = [Recorder(root, each) for each in made]
    for recorder in recorders:
        recorder.stats[:] = np.random.default_rng(0).random(recorder.stats.shape, np.float32)
    followed = Runs(root, retention_seconds=1e12)

    def step() -> None:
        for recorder in recorders:
            recorder.stats *= np.float32(1.0001)
            recorder.commit(ROW)
        followed.poll()

    for _ in range(WARMUP_STEPS + 2):  # before that many a layer has no score, and a series less
        step()
    while followed.poll():
        pass
    return Exposition(followed, series_budget=10_000_000, total_series=10_000_000), step


def compress(body: bytes) -> bytes:
    """Compress as the monitor does for who accepts gzip."""
    return bytes(cramjam.gzip.compress(body, level=GZIP_LEVEL))


def measure(exposition: Exposition, step: Callable[[], None], rss_before: int, rounds: int) -> Details:
    """Take CPU times, sizes and memory of one monitor's scrape, each after a step."""
    step()
    body = exposition.render()
    tracemalloc.start()
    step()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    exposition.render()
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    return {
        "cpu_seconds": _cpu(exposition.render, step, rounds),
        "cpu_seconds_with_gzip": _cpu(lambda: compress(exposition.render()), step, rounds),
        "cpu_seconds_with_zlib_level_1": _cpu(lambda: gzip.compress(exposition.render(), 1), step, rounds),
        "cpu_seconds_holding_the_lock": _cpu(exposition._take, step, rounds),
        "cpu_seconds_nothing_changed": _cpu(exposition.render, lambda: None, rounds),
        "series": body.count(b"\n") - body.count(b"\n#"),
        "bytes": len(body),
        "bytes_gzip": len(compress(body)),
        "scrape_peak_bytes": peak,
        "process_bytes_more": psutil.Process().memory_info().rss - rss_before,
    }


def _cpu(call: Callable[[], object], prepare: Callable[[], None], rounds: int) -> float:
    """Return the median CPU seconds of a call, all threads of the process together."""
    times = []
    for _ in range(rounds):
        prepare()
        started = time.process_time()
        call()
        times.append(time.process_time() - started)
    return statistics.median(times)


def show(title: str, details: Details) -> None:
    """Print what was measured of one monitor."""
    print(f"{title}: the monitor's scrape")
    for name, value in details.items():
        text = (
            f"{value * 1e3:10.2f} ms"
            if "seconds" in name
            else f"{value / 2**20:10.2f} MiB"
            if "bytes" in name
            else f"{value:10}"
        )
        print(f"  {name.replace('_', ' ').replace('bytes ', ''):34} {text}")


def main() -> None:
    """Compare at each number of series, and measure the monitor alone, also with many runs."""
    options = arguments(__doc__, quick=True)
    sizes, many = (SERIES[:1], MANY // 20) if options.quick else (SERIES, MANY)
    results, details = {}, {}
    for series in sizes:
        layers = series // len(LAYER_METRICS)
        with tempfile.TemporaryDirectory() as root:
            rss = psutil.Process().memory_info().rss
            exposition, step = monitor(Path(root), layers)
            details[str(series)] = measure(exposition, step, rss, options.rounds)
            calls = {
                "client objects": client_objects(layers),
                "collector yielding families": families(layers),
                "cached templates": exposition.render,
            }
            before: dict[str, Callable[[], object]] = {"cached templates": step}
            results[str(series)] = compare(calls, rounds=options.rounds, baseline="client objects", before=before)
        report(f"{series} series", results[str(series)])
        show(f"{series} series", details[str(series)])
    with tempfile.TemporaryDirectory() as root:
        rss = psutil.Process().memory_info().rss
        name = f"{sizes[-1]} series in {many} runs"
        exposition, step = monitor(Path(root), sizes[-1] // len(LAYER_METRICS) // many, many)
        details[name] = measure(exposition, step, rss, options.rounds)
        show(name, details[name])
    write_json(options.json, results, benchmark="exposition", details=details)


if __name__ == "__main__":
    main()
