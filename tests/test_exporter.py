"""The collector for those who export from inside the training process."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from gradiometer.exporter import RunCollector, collector
from gradiometer.metrics import CATALOGUE
from gradiometer_monitor.exposition.exposition import Exposition
from gradiometer_monitor.following.runs import Runs

if TYPE_CHECKING:
    from tests.conftest import Append, MakeManifest, WriteRun


@pytest.fixture
def registered() -> Callable[..., tuple[RunCollector, CollectorRegistry]]:
    """Give a function that registers the collector of paths or agents in a registry of its own."""

    def register(*sources: Path) -> tuple[RunCollector, CollectorRegistry]:
        registry = CollectorRegistry()
        made = collector(*sources)
        registry.register(made)
        return made, registry

    return register


def _samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], np.float32]:
    """Map each sample to its value, without what the exporters say of themselves."""
    own = ("process_", "python_", "gradiometer_collector", "gradiometer_series", "gradiometer_scrape")
    found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(s.name, frozenset(s.labels.items())): np.float32(s.value) for s in found if not s.name.startswith(own)}


def test_it_says_what_the_monitor_says(tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun) -> None:
    """Inside the process and in the daemon the same run has the same samples."""
    recorder = write_run(
        make_manifest(policies=("clip",)), np.random.default_rng(0).random((20, 4)), clipped=1, first_nonfinite=2
    )
    registry = CollectorRegistry()
    registry.register(made := collector(recorder))
    inside = generate_latest(registry).decode()
    runs = Runs(tmp_path, retention_seconds=1e12)
    runs.poll()
    outside = Exposition(runs, series_budget=10_000).render().decode()
    runs.close()
    made.close()
    assert _samples(inside) == _samples(outside)
    assert 'gradiometer_collector_success{collector="exporter"} 1.0' in inside


def test_registering_does_not_collect(tmp_path: Path, registered: Callable[..., tuple[RunCollector, object]]) -> None:
    """The names are described before there is any run, so that a clash with another collector is refused."""
    made, _ = registered(tmp_path / "run/rank-00000")
    assert {family.name for family in made.describe()} == {metric.family for metric in CATALOGUE.values()}
    assert all(not family.samples for family in made.describe())


def test_a_failure_never_loses_the_scrape(
    tmp_path: Path,
    make_manifest: MakeManifest,
    write_run: WriteRun,
    registered: Callable[..., tuple[RunCollector, CollectorRegistry]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Of a missing run and a good one the good is served, with the job's own metrics; the log says it once."""
    good = write_run(make_manifest(), np.ones((3, 4)))
    made, registry = registered(good, tmp_path / "gone/rank-00000")
    Gauge("own", "The job's own metric.", registry=registry).set(7)
    for _ in range(2):
        text = generate_latest(registry).decode()
    made.close()
    assert "own 7.0" in text
    assert 'gradiometer_steps_total{run_id="run"} 3.0' in text
    assert 'gradiometer_collector_success{collector="exporter"} 0.0' in text
    assert len(caplog.records) == 1


def test_it_follows_the_ring(
    make_manifest: MakeManifest,
    write_run: WriteRun,
    append: Append,
    registered: Callable[..., tuple[RunCollector, CollectorRegistry]],
) -> None:
    """Each scrape counts the rows that came since the last, once, also when the ring was overtaken or replaced."""
    recorder = write_run(make_manifest(capacity=8), np.ones((3, 4)))
    made, registry = registered(recorder.path)

    def value(name: str) -> float | None:
        return registry.get_sample_value(name, {"run_id": "run"})

    assert value("gradiometer_grad_norm_count") == 3
    append(recorder, np.ones((20, 4)))
    assert value("gradiometer_grad_norm_count") == 3 + 8
    assert value("gradiometer_rows_dropped_total") == 12
    assert value("gradiometer_steps_total") == 23
    recorder.close()
    time.sleep(0.01)
    write_run(make_manifest(), np.ones((2, 4)))
    assert value("gradiometer_grad_norm_count") == 2
    made.close()


def test_it_takes_anything_with_a_path(make_manifest: MakeManifest, write_run: WriteRun) -> None:
    """A path, its text, and an agent are the same source, taken once."""
    path = write_run(make_manifest(), np.ones((3, 4))).path
    made = collector(path, str(path), SimpleNamespace(path=path))
    families = {family.name: family for family in made.collect()}
    made.close()
    assert len(families["gradiometer_steps"].samples) == 1


def test_scrapes_from_several_threads(make_manifest: MakeManifest, write_run: WriteRun, append: Append) -> None:
    """Scrapers at the same time see each row counted once."""
    recorder = write_run(make_manifest(capacity=100_000), np.ones((1, 4)))
    registry = CollectorRegistry()
    registry.register(made := collector(recorder))
    threads = [threading.Thread(target=lambda: [generate_latest(registry) for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    append(recorder, np.ones((300, 4)))
    for thread in threads:
        thread.join()
    assert registry.get_sample_value("gradiometer_grad_norm_count", {"run_id": "run"}) == 301
    made.close()


def test_it_needs_no_torch() -> None:
    """The exporter can serve a run from a process without torch."""
    code = "import gradiometer.exporter, sys; sys.exit('torch' in sys.modules)"
    environment = {"PYTHONPATH": ":".join(filter(None, sys.path))}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=60).returncode == 0
