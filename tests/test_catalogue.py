"""Every metric of the monitor that the catalogue declares is one that a monitor sets."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from gradiometer.metrics.of_monitor import OF_MONITOR
from gradiometer_monitor.following.events import Events
from gradiometer_monitor.following.runs import Runs
from gradiometer_monitor.gpu.service import GpuService, GpuSettings
from gradiometer_monitor.services import Context
from gradiometer_monitor.store import Store
from tests._nvml import Card, FakeNvml
from tests._web import AS_READER, write_tokens

if TYPE_CHECKING:
    from tests.conftest import MakeManifest, Start, WaitUntil, WriteRun


@pytest.fixture
def of_gpus(
    tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun, monkeypatch: pytest.MonkeyPatch
) -> set[str]:
    """Name the metrics of a GPU on which a run of this process computes."""
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(Card(uuid="GPU-a", pids=[os.getpid()])))
    write_run(make_manifest(), [[1.0] * 4])
    runs, store = Runs(tmp_path, retention_seconds=1e12), Store(None)
    runs.poll()
    service = GpuService(GpuSettings(), Context(runs=runs, events=Events(runs, store), store=store))
    service.work()
    found = {name for name, _, _ in service.samples()}
    service.close()
    runs.close()
    store.close()
    return found


def test_a_monitor_sets_all_that_is_declared_of_it(
    of_gpus: set[str], start: Start, wait_until: WaitUntil, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """With everything switched on, and nobody there whom it tells, a daemon serves each family but those of GPUs."""
    directory, nobody = tmp_path_factory.mktemp("config"), "http://127.0.0.1:1"
    config = {
        "auth": {"tokens_file": str(write_tokens(directory / "tokens"))},
        "grafana": {"url": "http://me:secret@127.0.0.1:1"},
        "remote_write": [{"name": "nobody", "url": f"{nobody}/write"}],
        "alerts": {"rules": [{"name": "save", "alertname": "Spike", "action": "checkpoint"}]},
    }
    (directory / "monitor.yaml").write_text(yaml.safe_dump(config))
    monitor = start("--config", str(directory / "monitor.yaml"))
    declared = {metric.name for metric in OF_MONITOR}

    def served() -> set[str]:
        lines = monitor.get("/metrics", **AS_READER)[1].decode().splitlines()
        return {line.split()[2] for line in lines if line.startswith("# TYPE ")}

    wait_until(lambda: declared <= served() | of_gpus)  # some are measured first
