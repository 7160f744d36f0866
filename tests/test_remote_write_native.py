"""Remote write against Debian's Prometheus and VictoriaMetrics, as processes that die and come back."""

from __future__ import annotations

import sys
import time
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import cramjam
import numpy as np
import pytest

from gradiometer.run import Run, open_run
from gradiometer_monitor.remote_write.protocol import message
from tests._monitor import Monitor
from tests._receivers import Database, prometheus, victoria

if TYPE_CHECKING:
    from tests.conftest import MakeManifest, Spawn, Start, WaitUntil, WriteRun

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


BURSTS = """
import os, sys, time
import numpy as np, psutil
from pathlib import Path
from gradiometer.records import Manifest
from gradiometer.recorder import Recorder, RowHeader

manifest = Manifest.model_validate_json(sys.argv[2])
mine = {"pid": os.getpid(), "process_start": psutil.Process().create_time(), "created_ns": time.time_ns()}
recorder = Recorder(Path(sys.argv[1]), manifest.model_copy(update=mine))
rng, nan = np.random.default_rng(manifest.rank), float("nan")
for step in range(int(sys.argv[3])):
    recorder.stats[:] = rng.random(recorder.stats.shape, np.float32)
    norm = float(np.sqrt(np.square(recorder.stats[0].astype(np.float64)).sum()))
    recorder.commit(RowHeader(step, time.time_ns(), 0, 0, 0, 1, -1, 0, norm, norm, 1.0, 0.1, nan, 1.0, 0.01, 0.001))
    if step % 20 == 19:
        time.sleep(0.04)
        recorder.amend(float(step))
recorder.close()
"""
"""Writes twenty steps at once, then waits, and logs the loss of the last when all may have read it."""


class Make(Protocol):
    def __call__(self, name: str, window: str = ...) -> Database: ...


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
    more = "" if name == "prometheus" else ", rewind_seconds: 30"
    monitor = start(*config(tmp_path, receiver.write_url, more))
    manifest = make_manifest("live", capacity=20_000)
    writer = spawn(sys.executable, "-c", PACED, tmp_path, manifest.model_dump_json(), "10000")
    for after in (2000, 5000):
        wait_until(partial(reached, monitor, after))
        receiver.kill()
        time.sleep(0.5)  # an outage, in which steps are written
        receiver.start()
    assert writer.wait(timeout=120) == 0
    wait_until(lambda: metric(monitor, "pending_rows") == 0 and metric(monitor, "rows_sent_total") >= 10_000)
    wait_until(lambda: len(receiver.points('gradiometer_step_number{run_id="live"}')) == 10_000)
    compare(receiver, open_run(tmp_path / "live"), exact=name == "prometheus")


@pytest.mark.native
@pytest.mark.parametrize("window", ["", "30m"])
def test_a_killed_monitor_loses_and_spoils_nothing(
    window: str, database: Make, start: Start, make_manifest: MakeManifest, spawn: Spawn, wait_until: WaitUntil,
    tmp_path: Path,
) -> None:  # fmt: skip
    """Killed in the middle and started again, every step is there once; nothing counts as rejected."""
    receiver = database("prometheus", window)
    options = config(tmp_path, receiver.write_url)
    monitor = start(*options)
    manifest = make_manifest("live", capacity=20_000)
    writer = spawn(sys.executable, "-c", PACED, tmp_path, manifest.model_dump_json(), "3000")
    for after in (500, 1200):
        wait_until(partial(reached, monitor, after))
        monitor.process.kill()
        monitor.process.wait()
        tmp_path.with_name(f"{tmp_path.name}-port").unlink()
        monitor = start(*options)
    assert writer.wait(timeout=60) == 0
    wait_until(lambda: len(receiver.points('gradiometer_step_number{run_id="live"}')) == 3000)
    wait_until(lambda: metric(monitor, "pending_rows") == 0)  # the other series of the last rows are there too
    compare(receiver, open_run(tmp_path / "live"), exact=True)
    assert metric(monitor, "samples_failed_total", "rejected") == 0


def placed(run: Run) -> list[int]:
    """Give each step the millisecond that it happened in, or else the next that no step before it has."""
    times, newest = [], 0
    for own in (run.rows["time_ns"] // 1_000_000).tolist():
        newest = max(own, newest + 1)
        times.append(newest)
    return times


@pytest.mark.native
@pytest.mark.slow
def test_two_ranks_in_bursts_are_there_exactly(
    database: Make, start: Start, make_manifest: MakeManifest, spawn: Spawn, wait_until: WaitUntil, tmp_path: Path
) -> None:
    """Steps of one millisecond, losses that come late, two ranks; receiver and monitor are killed: nothing is amiss."""
    receiver = database("prometheus", "30m")
    options = config(tmp_path, receiver.write_url)
    monitor = start(*options)
    for rank in range(2):
        manifest = make_manifest("live", capacity=20_000, rank=rank, world_size=2)
        spawn(sys.executable, "-c", BURSTS, tmp_path, manifest.model_dump_json(), "4000")
        wait_until(partial(followed, monitor, rank))  # of a rank that came alone, the layers would be sent
    wait_until(partial(reached, monitor, 1000))
    receiver.kill()
    monitor.process.kill()
    monitor.process.wait()
    tmp_path.with_name(f"{tmp_path.name}-port").unlink()
    monitor = start(*options)
    time.sleep(0.5)  # it comes up while nobody takes anything
    receiver.start()
    number = 'gradiometer_step_number{run_id="live"}'
    wait_until(lambda: [len(points) for _, points in receiver.series(number)] == [4000, 4000])
    wait_until(lambda: metric(monitor, "pending_rows") == 0)
    for rank in range(2):
        run = open_run(tmp_path / "live", rank)
        times, select = placed(run), f'{{run_id="live",rank="{rank}"}}'
        assert receiver.points(f"gradiometer_step_number{select}") == dict(zip(times, run.steps.tolist(), strict=True))
        norms = dict(zip(times, run.grad_norm_preclip.tolist(), strict=True))
        assert receiver.points(f"gradiometer_step_grad_norm{select}") == norms
        losses = {time: float(step) for step, time in enumerate(times) if step % 20 == 19}
        assert receiver.points(f"gradiometer_step_loss{select}") == losses
    layers = [labels["rank"] for labels, _ in receiver.series('gradiometer_step_layer_grad_norm{run_id="live"}')]
    assert layers == ["0"] * 3


@pytest.mark.native
def test_a_poisoned_batch_in_prometheus(
    database: Make,
    start: Start,
    make_manifest: MakeManifest,
    write_run: WriteRun,
    wait_until: WaitUntil,
    tmp_path: Path,
) -> None:
    """A timestamp that is taken with another value (400) and one that is too old (500) cost their samples only."""
    receiver = database("prometheus")
    first = (int(time.time()) - 60) * 1000
    labels = {
        "__name__": "gradiometer_step_loss",
        "instance": "here",
        "job": "gradiometer",
        "rank": "0",
        "run_id": "run",
    }
    occupy(receiver, labels, first + 10_000, 99.0)
    labels["__name__"] = "gradiometer_step_learning_rate"
    occupy(receiver, labels, first + 20_000, 99.0)
    times = [(first + place * 1000) * 10**6 for place in range(30)]
    write_run(make_manifest("run"), np.ones((30, 4)), time_ns=times, loss=1.5, close=True)
    monitor = start(*config(tmp_path, receiver.write_url, ", labels: {instance: here}"))
    wait_until(lambda: metric(monitor, "rows_sent_total") == 30)
    # Older than what is there: the loss of 0 to 10, the learning rate of 0 to 20.
    assert metric(monitor, "samples_failed_total", "rejected") == 11 + 21
    loss = receiver.points('gradiometer_step_loss{run_id="run"}')
    assert loss == {first + 10_000: 99.0} | {first + place * 1000: 1.5 for place in range(11, 30)}
    assert len(receiver.points('gradiometer_step_learning_rate{run_id="run"}')) == 1 + 9
    assert len(receiver.points('gradiometer_step_number{run_id="run"}')) == 30


@pytest.mark.native
def test_samples_beyond_the_window_of_prometheus(
    database: Make,
    start: Start,
    make_manifest: MakeManifest,
    write_run: WriteRun,
    wait_until: WaitUntil,
    tmp_path: Path,
) -> None:
    """It answers 500 to what is too old, for as long as it is asked: found out, counted, and nothing waits for it."""
    receiver = database("prometheus", "10m")
    now = int(time.time()) * 1000
    occupy(receiver, {"__name__": "up"}, now, 1.0)
    times = [(now - 4 * 3600_000 + place * 1000) * 10**6 for place in range(5)]
    times += [(now - 60_000 + place * 1000) * 10**6 for place in range(5)]
    write_run(make_manifest("run", created_ns=time.time_ns()), np.ones((10, 4)), time_ns=times, close=True)
    monitor = start(*config(tmp_path, receiver.write_url, ", max_age_seconds: 86400"))
    wait_until(lambda: metric(monitor, "rows_sent_total") == 10)
    assert metric(monitor, "samples_failed_total", "rejected") > 0
    found = receiver.points('gradiometer_step_number{run_id="run"}')
    assert found == {time_ns // 10**6: float(step) for step, time_ns in enumerate(times) if step >= 5}


@pytest.mark.native
def test_nan_and_staleness_in_both(
    database: Make,
    start: Start,
    make_manifest: MakeManifest,
    write_run: WriteRun,
    wait_until: WaitUntil,
    tmp_path: Path,
) -> None:
    """Prometheus keeps a norm that is NaN; a run that is over is no longer there for a query of now."""
    receiver = database("prometheus")
    times = [time.time_ns() - (20 - place) * 10**9 for place in range(5)]
    norms = np.ones((5, 4))
    norms[2] = np.nan
    write_run(make_manifest("run"), norms, time_ns=times, close=True)
    monitor = start(*config(tmp_path, receiver.write_url))
    wait_until(lambda: metric(monitor, "rows_sent_total") == 5)
    found = receiver.points('gradiometer_step_grad_norm{run_id="run"}')
    assert [value != value for _, value in sorted(found.items())] == [False, False, True, False, False]
    wait_until(
        lambda: b'"result":[]' in (receiver.get("/api/v1/query", query='gradiometer_step_number{run_id="run"}') or b"")
    )


def reached(monitor: Monitor, steps: int) -> bool:
    """Tell whether the live run has so many steps."""
    return bool(monitor.runs().get("live", {}).get("steps", 0) >= steps)


def followed(monitor: Monitor, rank: int) -> bool:
    """Tell whether the monitor has found this rank of the live run."""
    return ("gradiometer_last_step_timestamp_seconds", ("live", str(rank))) in monitor.samples()


def occupy(receiver: Database, labels: dict[str, str], at_ms: int, value: float) -> None:
    """Write one sample of somebody else's."""
    request = message("WriteRequest")()
    series = request.timeseries.add()
    for name, text in sorted(labels.items()):
        series.labels.add(name=name, value=text)
    series.samples.add(value=value, timestamp=at_ms)
    body = bytes(cramjam.snappy.compress_raw(request.SerializeToString()))
    headers = {"Content-Encoding": "snappy", "Content-Type": "application/x-protobuf"}
    with urllib.request.urlopen(urllib.request.Request(receiver.write_url, body, headers), timeout=20) as response:
        assert response.status == 204


def metric(monitor: Monitor, name: str, *labels: str) -> float:
    """Return a metric of the receiver's."""
    return monitor.samples()[f"gradiometer_remote_write_{name}", ("db", *labels)]
