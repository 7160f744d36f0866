"""Remote write against Debian's Prometheus and VictoriaMetrics, as processes that die and come back."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from gradiometer.run import Run, open_run
from tests._receivers import Database, prometheus, victoria

if TYPE_CHECKING:
    import subprocess

    from tests.conftest import MakeManifest, Spawn, Start, WaitUntil, WriteRun

PROBE = "gradiometer_remote_write_probe"
PACED = """
import os, sys, time
import numpy as np, psutil
from pathlib import Path
from gradiometer.records import Manifest
from gradiometer.recorder import Recorder, RowHeader

manifest = Manifest.model_validate_json(sys.argv[2])
mine = {"pid": os.getpid(), "process_start": psutil.Process().create_time(), "created_ns": time.time_ns()}
recorder = Recorder(Path(sys.argv[1]), manifest.model_copy(update=mine))
rng = np.random.default_rng(0)
newest = 0
for step in range(int(sys.argv[3])):
    while time.time_ns() // 1_000_000 <= newest:
        time.sleep(0.0002)
    recorder.stats[:] = rng.random(recorder.stats.shape, np.float32)
    norm = float(np.sqrt(np.square(recorder.stats[0].astype(np.float64)).sum()))
    now, rest = time.time_ns(), (norm, norm, 1.0, 0.1, 2.0, 1.0, 0.01, 0.001)
    newest = now // 1_000_000
    recorder.policies[:, :2] = (1.0, 2.5), (0.5, 0.75)
    recorder.commit(RowHeader(step, now, 128, step % 2, 0, 1, -1, 0, *rest))
recorder.close()
"""
"""Writes steps as fast as each can have a millisecond of its own, and finishes."""
Make = Callable[[str], Database]


@pytest.fixture
def database(
    native_binary: Callable[[str], str],
    tmp_path_factory: pytest.TempPathFactory,
    free_port: int,
    spawn: Spawn,
    wait_until: WaitUntil,
) -> Make:
    """Give a function that starts a receiver by the name of its program."""

    def make(name: str, window: str = "") -> Database:
        program, data = native_binary(name), tmp_path_factory.mktemp(name)
        if name == "prometheus":
            made = prometheus(program, data, free_port, spawn, wait_until, window)
        else:
            made = victoria(program, data, free_port, spawn, wait_until)
        made.start()
        return made

    return make


def config(tmp_path: Path, url: str, more: str = "") -> tuple[str, str]:
    """Write the settings of a monitor that pushes to one receiver; return the option that names them."""
    path = tmp_path.with_name(f"{tmp_path.name}-config.yaml")
    path.write_text(f"remote_write: [{{name: db, url: '{url}', flush_seconds: 0.2, backoff_max_seconds: 1{more}}}]\n")
    return "--config", str(path)


def compare(database: Database, run: Run, *, exact: bool) -> None:
    """Compare what the receiver has with the ring: each step's value, at its own millisecond."""
    times = (run.rows["time_ns"] // 1_000_000).tolist()
    tolerance = {"rel": 0, "abs": 0} if exact else {"rel": 1e-11}
    select = f'{{run_id="{run.manifest.run_id}",rank="0"'

    def check(name: str, values: np.ndarray, more: str = "") -> None:
        found = database.points(f"{name}{select}{more}}}")
        assert sorted(found) == times
        assert [found[time] for time in times] == pytest.approx(values.tolist(), **tolerance)

    check("gradiometer_step_number", run.steps)
    check("gradiometer_step_grad_norm", run.grad_norm_preclip)
    check("gradiometer_step_loss", run.loss)
    norms = run.layer_norms()
    for place, layer in enumerate(run.layers):
        check("gradiometer_step_layer_grad_norm", norms[:, place], f',layer="{layer}"')


@pytest.mark.native
@pytest.mark.slow
@pytest.mark.parametrize("name", ["prometheus", "victoria-metrics"])
def test_every_step_arrives_though_the_receiver_dies(
    name: str,
    database: Make,
    start: Start,
    make_manifest: MakeManifest,
    spawn: Spawn,
    wait_until: WaitUntil,
    tmp_path: Path,
) -> None:
    """10 000 steps of a live run, the receiver killed twice meanwhile: each is there, at its time, with its value."""
    receiver = database(name)
    more = "" if name == "prometheus" else ", rewind_seconds: 10"
    monitor = start(*config(tmp_path, receiver.write_url, more))
    manifest = make_manifest("live", capacity=20_000)
    writer = spawn(sys.executable, "-c", PACED, tmp_path, manifest.model_dump_json(), "10000")
    for after in (2000, 5000):
        wait_until(lambda after=after: monitor.runs().get("live", {}).get("steps", 0) >= after, 60)
        receiver.kill()
        time.sleep(0.5)  # an outage, in which steps are written
        receiver.start()
    assert writer.wait(timeout=120) == 0
    wait_until(lambda: pending(monitor) == 0 and sent_rows(monitor) >= 10_000, 60)
    wait_until(lambda: len(receiver.points('gradiometer_step_number{run_id="live"}')) == 10_000, 20)
    compare(receiver, open_run(tmp_path / "live"), exact=name == "prometheus")


def pending(monitor: object) -> float:
    return monitor.samples()["gradiometer_remote_write_pending_rows", ("db",)]


def sent_rows(monitor: object) -> float:
    return monitor.samples()["gradiometer_remote_write_rows_sent_total", ("db",)]
