"""A monitor that was started as a process, and a process that writes a run."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families


@dataclass(frozen=True, kw_only=True)
class Monitor:
    """A daemon that was started, and where it serves."""

    process: subprocess.Popen[str]
    url: str
    root: Path
    """Where its runs live."""

    def get(self, path: str, **headers: str) -> tuple[int, bytes, dict[str, str]]:
        """Ask for a path: status, body and headers."""
        request = urllib.request.Request(self.url + path, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.read(), dict(response.headers)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read(), dict(error.headers)

    def samples(self) -> dict[tuple[str, tuple[str, ...]], float]:
        """Scrape once: name and label values to value."""
        families = text_string_to_metric_families(self.get("/metrics")[1].decode())
        return {(s.name, tuple(s.labels.values())): s.value for family in families for s in family.samples}

    def runs(self) -> dict[str, dict[str, Any]]:
        """Ask the API for its runs, by name."""
        return {run["run_id"]: run for run in json.loads(self.get("/api/v1/runs")[1])["runs"]}

    def state(self, run_id: str) -> str | None:
        """Ask the API for the state of one run."""
        return self.runs().get(run_id, {}).get("state")

    def end(self, number: signal.Signals = signal.SIGTERM) -> str:
        """End it by a signal, in good order, and return its log, which is empty unless its errors go to a pipe."""
        self.process.send_signal(number)
        _, log = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, log
        return log or ""


def launch(
    spawn: Callable[..., subprocess.Popen[str]], wait_until: Callable[..., Any], root: Path, *options: str, **more: Any
) -> Monitor:
    """Start a daemon over ``root`` on a free port, with ``more`` for its process, and wait until it is ready."""
    port_file = root.with_name(f"{root.name}-port")
    port_file.unlink(missing_ok=True)  # of one that was started before over the same root
    command = (sys.executable, "-m", "gradiometer_monitor", "--dir", root, "--port", "0", "--port-file", port_file)
    process = spawn(*command, "--poll-seconds", "0.1", *options, **more)
    wait_until(lambda: port_file.exists() or process.poll() is not None)
    assert process.poll() is None, process.communicate()[1] or "the monitor ended: see its output"
    monitor = Monitor(process=process, url=f"http://127.0.0.1:{port_file.read_text().strip()}", root=root)
    wait_until(lambda: monitor.get("/-/ready")[0] == 200)
    return monitor


WRITER = """
import os, sys, time
import numpy as np, psutil
from pathlib import Path
from gradiometer.records import Manifest
from gradiometer.recorder import Recorder, RowHeader

manifest = Manifest.model_validate_json(sys.argv[2])
mine = {"pid": os.getpid(), "process_start": psutil.Process().create_time(), "created_ns": time.time_ns()}
recorder = Recorder(Path(sys.argv[1]), manifest.model_copy(update=mine))
rng = np.random.default_rng(0)
for step in range(int(sys.argv[3])):
    recorder.stats[:] = rng.random(recorder.stats.shape, np.float32)
    norm = float(np.sqrt(np.square(recorder.stats[0].astype(np.float64)).sum()))
    now, rest = time.time_ns(), (norm, norm, 1.0, 0.1, 2.0, 1.0, 0.01, 0.001)
    recorder.policies[:, :2] = (1.0, 2.5), (0.5, 0.75)
    recorder.commit(RowHeader(step, now, 128, step % 2 + 2 * (step % 3 > 0), 0, 1, -1, 0, *rest))
print("written", flush=True)
if sys.argv[4] == "finish":
    recorder.close()
else:
    time.sleep(600)
"""
