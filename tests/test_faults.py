"""The monitor under hostile requests, alerts that cannot be done, reloads, and a store that is taken away."""

from __future__ import annotations

import contextlib
import gc
import logging
import sqlite3
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest

from gradiometer_monitor.alerts.service import AlertService
from gradiometer_monitor.alerts.settings import AlertSettings
from gradiometer_monitor.following.events import Events
from gradiometer_monitor.following.runs import Runs
from gradiometer_monitor.grafana.service import GrafanaService
from gradiometer_monitor.grafana.settings import GrafanaSettings
from gradiometer_monitor.services import Context, Service
from gradiometer_monitor.store import Store
from tests._alerts import Bench, alert
from tests._monitor import Monitor
from tests._web import AS_WRITER, connect, logged, send, write_config, write_tokens

if TYPE_CHECKING:
    from tests.conftest import MakeManifest, Start, WaitUntil, WriteRun

DATABASE = "monitor.sqlite"
PERSISTENT = "gradiometer_store_persistent", ()


@pytest.fixture
def guarded(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Monitor:
    """Give a daemon with tokens."""
    home = tmp_path_factory.mktemp("home")
    tokens = write_tokens(home / "tokens")
    return start("--config", write_config(home / "monitor.yaml", auth={"tokens_file": str(tokens)}))


@pytest.mark.parametrize("origin", ["http://[", "http://[::1", "http://]x"])
def test_an_origin_that_is_none_is_refused(guarded: Monitor, origin: str) -> None:
    """What is not even a URL is no origin of this monitor's, and no fault of it either."""
    status, answer, _ = send(guarded, "PUT", "/api/v1/runs/run/policy", {"policy": None}, **AS_WRITER, Origin=origin)
    assert status == 403
    assert "another origin" in answer["detail"]


@pytest.mark.parametrize(
    ("path", "method", "body"),
    [
        ("/api/v1/alerts", "POST", b'{"version": NaN, "alerts": Infinity}'),
        ("/api/v1/alerts", "POST", b'{"version": "\\ud800", "alerts": []}'),
        ("/api/v1/runs/run/policy", "PUT", b'{"policy": NaN}'),
        ("/api/v1/runs/run/policy", "PUT", b'{"policy": null, "note": "\\ud800"}'),
        ("/api/v1/runs/run/policy", "PUT", b'{"policy": null, "rank": 1e999}'),
    ],
)
def test_what_no_json_can_repeat_is_422(guarded: Monitor, path: str, method: str, body: bytes) -> None:
    """Python reads NaN and halves of surrogate pairs, and cannot write them: the answer names the field."""
    status, answer, _ = send(guarded, method, path, body, **AS_WRITER)
    assert status == 422
    assert answer["detail"][0]["loc"][0] == "body"


def test_who_heaps_requests_up_keeps_nobody_out(
    start: Start, tmp_path_factory: pytest.TempPathFactory, make_manifest: MakeManifest, write_run: WriteRun
) -> None:
    """Connections on which hundreds of requests were sent at once make room for one that asks for a scrape."""
    write_run(make_manifest("run"), np.ones((5, 4)))
    limits = {"max_connections": 16, "max_connections_per_client": 12, "answer_seconds": 60}
    home = tmp_path_factory.mktemp("home")
    monitor = start("--config", write_config(home / "monitor.yaml", limits=limits))
    asked = f"GET /api/v1/runs HTTP/1.1\r\nHost: {monitor.url.removeprefix('http://')}\r\n\r\n".encode()
    held = [connect(monitor) for _ in range(12)]
    try:
        for connection in held:
            connection.sendall(asked * 600)
        for connection in held:
            assert connection.recv(1)  # all are being served
        for _ in range(5):
            assert monitor.get("/metrics")[0] == 200
    finally:
        for connection in held:
            connection.close()


def test_an_alert_that_cannot_be_done_holds_up_no_other(
    tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is wrong with one alert is told of it, and those behind it are done."""
    write_run(make_manifest("broken"), np.ones((5, 4)))
    write_run(make_manifest("run"), np.ones((5, 4)))
    from gradiometer_monitor.alerts import jobs

    def fail(run: Path, *_: Any, **__: Any) -> str:
        if run.name == "broken":
            raise TypeError("whatever")
        return "id"

    monkeypatch.setattr(jobs, "request_loop", fail)
    bench = Bench(tmp_path, {"name": "save", "action": "checkpoint"})
    try:
        bench.post(alert("broken"), alert("run"))
        assert bench.turn() == ["failed", "asked"]
        assert bench.turn() == ["failed", "asked"]
    finally:
        bench.close()


def test_an_alert_of_half_a_surrogate_is_told(tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun) -> None:
    """Half of a pair in a name or summary, which no file can hold, is '?' in the event, and the next event follows."""
    write_run(make_manifest("run"), np.ones((5, 4)))
    bench = Bench(
        tmp_path, {"name": "save", "action": "checkpoint", "alertname": None, "labels": {"team": "x"}}, dry_run=True
    )
    try:
        bench.post(alert("run", "\ud800\n", team="x"), alert("run", "Spike", team="x", start="2026-11-23T00:00:00Z"))
        assert bench.turn() == ["dry_run", "dry_run"]
        assert bench.told[0].data["alert"] == "?\n"
        bench.context.events.tell("run", "told", "half: \ud800")
        assert bench.store.events(kinds=["told"])[0].message == "half: ?"
    finally:
        bench.close()


@pytest.fixture
def context(tmp_path: Path) -> Iterator[Context]:
    """Give what services share."""
    store, runs = Store(None), Runs(tmp_path, retention_seconds=900)
    yield Context(runs=runs, events=Events(runs, store), store=store)
    store.close()


@pytest.mark.parametrize("kind", ["alerts", "grafana", "grafana, not started"])
def test_a_replaced_service_is_let_go(
    context: Context, free_port: int, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing calls, or holds, a service whose place another has taken, nor one that was built and never started."""

    def make() -> Service:
        if kind == "alerts":
            return AlertService(AlertSettings(), context)
        return GrafanaService(GrafanaSettings(url=f"http://a:b@127.0.0.1:{free_port}"), context)

    caplog.set_level(
        logging.CRITICAL, "gradiometer_monitor"
    )  # errors in records hold the frames that they came through
    old, new = make(), make()
    gone = weakref.ref(old)
    if "not" not in kind:
        old.start()
        old.stop(60.0)
    new.start()
    try:
        del old
        gc.collect()
        assert gone() is None
    finally:
        new.stop()


class _Idle(Service):
    """Has nothing to do for long."""

    name = "idle"
    sections = ("alerts",)

    def work(self) -> float:
        return 600.0


def test_a_service_that_is_stopped_as_it_begins_a_round_ends(
    monkeypatch: pytest.MonkeyPatch, wait_until: WaitUntil
) -> None:
    """The call to wake up that comes with the end is not lost between two rounds."""
    service = _Idle()
    clear = service._wake.clear

    def stopped_before() -> None:
        service.ask_to_stop()
        clear()

    monkeypatch.setattr(service._wake, "clear", stopped_before)
    service.start()
    wait_until(lambda: not service.alive)


def test_a_removed_state_is_told(start: Start, tmp_path_factory: pytest.TempPathFactory, wait_until: WaitUntil) -> None:
    """A state directory that is deleted under the monitor costs no answer, and its log and metrics say so."""
    state = tmp_path_factory.mktemp("state")
    monitor = start("--state-dir", str(state))
    assert monitor.samples()[PERSISTENT] == 1
    (state / DATABASE).unlink()
    assert monitor.samples()[PERSISTENT] == 0
    wait_until(logged(monitor, "was removed or replaced"))
    assert monitor.get("/api/v1/events")[0] == 200


@pytest.mark.slow
def test_a_store_that_cannot_be_written_is_told(
    start: Start,
    tmp_path_factory: pytest.TempPathFactory,
    make_manifest: MakeManifest,
    write_run: WriteRun,
    wait_until: WaitUntil,
) -> None:
    """While no file may grow the metric is 0 and runs are served; with room it is 1 again, and nothing was lost."""
    monitor = start("--state-dir", str(tmp_path_factory.mktemp("state")))
    process = psutil.Process(monitor.process.pid)
    write_run(make_manifest("before"), np.ones((5, 4)))
    wait_until(lambda: b"run_started" in monitor.get("/api/v1/events")[1])
    assert monitor.samples()[PERSISTENT] == 1
    _, hard = process.rlimit(psutil.RLIMIT_FSIZE)
    process.rlimit(psutil.RLIMIT_FSIZE, (0, hard))
    write_run(make_manifest("during"), np.ones((5, 4)))
    wait_until(lambda: monitor.samples()[PERSISTENT] == 0)
    wait_until(logged(monitor, "make room there"))
    wait_until(lambda: "during" in monitor.runs())
    process.rlimit(psutil.RLIMIT_FSIZE, (hard, hard))
    wait_until(lambda: monitor.samples()[PERSISTENT] == 1)
    wait_until(lambda: b"during" in monitor.get("/api/v1/events")[1])


def test_a_store_that_breaks_is_503(
    start: Start,
    tmp_path_factory: pytest.TempPathFactory,
    make_manifest: MakeManifest,
    write_run: WriteRun,
    wait_until: WaitUntil,
) -> None:
    """While its file is damaged, what needs the store says so; runs and metrics are served as ever."""
    state = tmp_path_factory.mktemp("state")
    monitor = start("--state-dir", str(state))
    write_run(make_manifest("run"), np.ones((5, 4)))
    wait_until(lambda: b"run_started" in monitor.get("/api/v1/events")[1])
    with contextlib.closing(sqlite3.connect(state / DATABASE, timeout=30, isolation_level=None)) as base:

        def held() -> bool:
            """Keep the monitor from writing while all is in the file: a newer page beside it would hide the damage."""
            base.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            base.execute("BEGIN IMMEDIATE")
            if (state / f"{DATABASE}-wal").stat().st_size:
                base.execute("ROLLBACK")
                return False
            return True

        wait_until(held)
        with (state / DATABASE).open("r+b") as file:
            file.seek(4096)
            file.write(b"\xff" * 2**16)
    wait_until(lambda: monitor.get("/api/v1/events")[0] == 503)
    assert b"its log says why" in monitor.get("/api/v1/events")[1]
    assert monitor.get("/api/v1/runs")[0] == monitor.get("/metrics")[0] == 200


@pytest.mark.parametrize("number", [1, 20])
def test_an_end_after_requests_warns_of_nothing(start: Start, number: int) -> None:
    """Threads that handlers of requests ran in are neither waited for nor warned of."""
    monitor = start()
    for _ in range(number):
        assert monitor.get("/api/v1/runs")[0] == 200
    assert "WARNING" not in monitor.end()
