"""The daemon under what a year brings: runs that come and go, reloads and scrapes, after which it holds no more."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
import pytest

from tests._monitor import Monitor
from tests._web import replace_config

if TYPE_CHECKING:
    from tests.conftest import MakeManifest, Start, WaitUntil, WriteRun

WAVE, WAVES = 40, 5
GROWTH_BYTES = 12 * 2**20
"""What a run's state takes is some hundred kilobytes: two hundred that were held would be more."""


class _Job:
    """What happens around a monitor: waves of runs, and settings that change."""

    def __init__(
        self, root: Path, config: Path, monitor: Monitor, write_run: WriteRun, make_manifest: MakeManifest
    ) -> None:
        self.root, self.config, self.monitor = root, config, monitor
        self._write, self._manifest = write_run, make_manifest
        self.written = 0

    def wave(self, wait_until: WaitUntil) -> None:
        """Write runs that end, with reloads and scrapes in between; have all been seen, and remove them."""
        layers = [f"blocks.{place}" for place in range(100)]
        names = []
        for place in range(WAVE):
            now, self.written = time.time_ns(), self.written + 1
            names.append(name := f"run-{self.written:04}")
            manifest = self._manifest(name, layers=layers, capacity=64, created_ns=now, labels={"wave": name})
            norms = np.random.default_rng(place).random((20, len(layers)))
            self._write(manifest, norms, close=True, time_ns=now)
            if place % 4 == 0:
                self._change(place)
        wait_until(lambda: set(names) <= self.monitor.runs().keys())
        for name in names:
            shutil.rmtree(self.root / name)

    def _change(self, place: int) -> None:
        """Reload twice, the second time from a config that is wrong, and scrape."""
        self._configure(f"retention_seconds: {3600 + place}\nlog: {{level: error}}\n")
        assert self.monitor.get("/metrics")[0] == 200
        self._configure("retention_seconds: never\n")
        assert self.monitor.get("/api/v1/runs")[0] == 200

    def _configure(self, text: str) -> None:
        """Replace the config by another, and reload."""
        replace_config(self.config, text)
        self.monitor.process.send_signal(signal.SIGHUP)


@pytest.mark.slow
def test_it_holds_no_more_after_two_hundred_runs(
    tmp_path: Path, start: Start, write_run: WriteRun, make_manifest: MakeManifest, wait_until: WaitUntil
) -> None:
    """Memory, files and threads return to what they were after the first wave, and it still serves."""
    config = tmp_path.with_name(f"{tmp_path.name}.yaml")
    config.write_text("retention_seconds: 3600\nlog: {level: error}\n")
    monitor = start("--config", str(config))
    process = psutil.Process(monitor.process.pid)
    job = _Job(tmp_path, config, monitor, write_run, make_manifest)

    def settled() -> bool:
        return monitor.runs() == {} and monitor.get("/metrics")[0] == 200

    job.wave(wait_until)
    wait_until(settled)
    files, threads, memory = process.num_fds(), process.num_threads(), process.memory_info().rss
    for _ in range(WAVES):
        job.wave(wait_until)
        wait_until(lambda: len(monitor.runs()) < WAVE)
    wait_until(settled)
    assert job.written == WAVE * (WAVES + 1)
    wait_until(lambda: process.num_fds() <= files)
    wait_until(lambda: process.num_threads() <= threads + 2)  # the pool of the server's handlers grows on demand
    assert process.memory_info().rss - memory < GROWTH_BYTES
    assert monitor.get("/-/healthy")[0] == 200
    log = monitor.end()
    assert "Traceback" not in log
