"""The daemon as a process: real runs on disk, real HTTP, a real Prometheus that scrapes it."""

from __future__ import annotations

import asyncio
import gzip
import json
import math
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from starlette.applications import Starlette

from gradiometer.run import open_run
from gradiometer_monitor.config.settings import Settings, SettingsError, resolve
from gradiometer_monitor.exposition.exposition import Exposition
from gradiometer_monitor.following.events import Events
from gradiometer_monitor.following.runs import Runs
from gradiometer_monitor.services import Context
from gradiometer_monitor.store import Store
from gradiometer_monitor.web.app import app

if TYPE_CHECKING:
    from tests.conftest import MakeManifest, Spawn, Start, Train, WaitUntil, WriteRun

NAN = float("nan")


def test_a_run_is_lost_with_any_of_its_ranks(
    start: Start, train: Train, make_manifest: MakeManifest, wait_until: WaitUntil
) -> None:
    """When one rank is killed the run is lost, though the lowest goes on."""
    monitor = start()
    lead, victim = (make_manifest("job").model_copy(update={"rank": rank, "world_size": 2}) for rank in range(2))
    train(lead, 5)
    killed = train(victim, 5)
    wait_until(lambda: monitor.state("job") == "running")
    killed.kill()
    wait_until(lambda: monitor.state("job") == "lost")


def test_states_of_runs(start: Start, train: Train, make_manifest: MakeManifest, wait_until: WaitUntil) -> None:
    """A run is running, finished when it says so, and lost when its process was killed."""
    monitor = start()
    train(make_manifest("ended"), 5, "finish")
    victim = train(make_manifest("victim"), 7)
    wait_until(lambda: monitor.state("ended") == "finished" and monitor.state("victim") == "running")
    victim.kill()
    wait_until(lambda: monitor.state("victim") == "lost")
    samples = monitor.samples()
    for run_id, state in (("ended", "finished"), ("victim", "lost")):
        states = [samples["gradiometer_run_state", (run_id, s)] for s in ("running", "finished", "lost")]
        assert states == [float(s == state) for s in ("running", "finished", "lost")]
    assert samples["gradiometer_steps_total", ("victim",)] == 7


def test_http_interface(start: Start, train: Train, make_manifest: MakeManifest, wait_until: WaitUntil) -> None:
    """Each path answers as documented; what is not known is null, and no path of the disk is told."""
    train(make_manifest("run-1", policies=("clip", "wider"), shadow=("wider",)), 5, "finish")
    monitor = start()
    wait_until(lambda: monitor.state("run-1") == "finished")
    assert monitor.get("/-/healthy")[:2] == (200, b"healthy\n")
    assert monitor.get("/nothing")[0] == 404
    preferred = {"Accept-Encoding": "gzip", "Accept": "application/openmetrics-text"}
    status, body, headers = monitor.get("/metrics", **preferred)
    assert (status, headers["content-encoding"]) == (200, "gzip")
    assert headers["content-type"] == "application/openmetrics-text; version=1.0.0; charset=utf-8"
    assert gzip.decompress(body).endswith(b"# EOF\n")
    headers = monitor.get("/metrics", **{"Accept-Encoding": "gzip;q=0"})[2]
    assert "content-encoding" not in headers
    assert headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    described = monitor.runs()["run-1"]
    assert {"steps": 5, "last_step": 4, "loss": 2.0, "ranks": [0], "clip_events": 2}.items() <= described.items()
    index = monitor.get("/")[1].decode()
    assert "<title>gradiometer" in index
    assert "<script>" not in index
    assert "/tmp" not in index + json.dumps(described)


def test_only_requests_to_this_host_are_served(start: Start) -> None:
    """A name that somebody else lets resolve to loopback is refused, on every path."""
    monitor = start()
    hosts = {"localhost:9477": 200, "127.0.0.1": 200, "[::1]:9477": 200, "evil.example:9477": 400, "": 400}
    for path in ("/metrics", "/api/v1/runs"):
        assert {host: monitor.get(path, Host=host)[0] for host in hosts} == hosts


def test_a_stuck_poll_is_not_healthy(tmp_path: Path) -> None:
    """The probe answers while the lock is held, and says 503 when no poll has been done for too long."""
    runs = Runs(tmp_path, retention_seconds=900)
    store = Store(None)
    context = Context(runs=runs, events=Events(runs, store), store=store)
    probe = app(context, Exposition(runs, series_budget=10_000), Settings(root=tmp_path, poll_seconds=5.0))
    with runs.snapshot():
        assert _asked(probe, "/-/healthy") == 200
        runs.polled_at -= 45
        assert _asked(probe, "/-/healthy") == 200
        runs.polled_at -= 10
        assert _asked(probe, "/-/healthy") == 503
    runs.poll()
    assert _asked(probe, "/-/healthy") == 200
    runs.close()
    store.close()


def _asked(asgi: Starlette, path: str) -> int:
    """Ask an application for a path, without a server; return the status."""
    found: list[int] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            found.append(message["status"])

    scope = {"type": "http", "method": "GET", "path": path, "headers": [(b"host", b"localhost")], "query_string": b""}
    asyncio.run(asgi(scope, receive, send))
    return found[0]


def test_numbers_that_json_cannot_hold_are_null(
    start: Start, make_manifest: MakeManifest, write_run: WriteRun, wait_until: WaitUntil
) -> None:
    """A run without a row, or whose norm is NaN, is valid JSON."""
    write_run(make_manifest("empty", created_ns=time.time_ns()), np.empty((0, 4)))
    write_run(make_manifest("bad", created_ns=time.time_ns()), [[NAN] * 4], loss=math.inf)
    monitor = start()
    wait_until(lambda: len(monitor.runs()) == 2)
    found = monitor.runs()
    assert found["empty"]["grad_norm"] is found["bad"]["grad_norm"] is found["bad"]["loss"] is None


@pytest.mark.native
def test_prometheus_stores_what_the_ring_holds(
    start: Start,
    train: Train,
    make_manifest: MakeManifest,
    spawn: Spawn,
    wait_until: WaitUntil,
    native_binary: Callable[[str], str],
    free_port: int,
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
) -> None:
    """Asked through its API, a real Prometheus has the values of two runs, one of them finished."""
    prometheus, data = native_binary("prometheus"), tmp_path_factory.mktemp("prometheus")
    layers = [f'blocks.{place}."q"' for place in range(40)]
    for run_id, end in (("live", "stay"), ("ended", "finish")):
        manifest = make_manifest(run_id, layers=layers, policies=("clip", "wider"), shadow=("wider",), capacity=256)
        train(manifest, 100, end)
    monitor = start()
    wait_until(lambda: monitor.state("ended") == "finished")
    (data / "prometheus.yml").write_text(
        "scrape_configs:\n- job_name: gradiometer\n  scrape_interval: 5s\n  scrape_timeout: 5s\n"
        f"  static_configs: [{{targets: ['{monitor.url.removeprefix('http://')}']}}]\n"
    )
    spawn(
        prometheus,
        f"--config.file={data}/prometheus.yml",
        f"--storage.tsdb.path={data}/tsdb",
        f"--web.listen-address=127.0.0.1:{free_port}",
        stderr=subprocess.DEVNULL,
    )

    def query(expression: str) -> list[dict[str, Any]]:
        url = f"http://127.0.0.1:{free_port}/api/v1/query?query={urllib.parse.quote(expression)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                found: list[dict[str, Any]] = json.load(response)["data"]["result"]
        except urllib.error.URLError:
            return []
        return found

    wait_until(lambda: len(query("gradiometer_steps_total")) == 2)
    assert [float(found["value"][1]) for found in query("up")] == [1.0]
    for run_id, state in (("live", "running"), ("ended", "finished")):
        run = open_run(tmp_path / run_id)
        _compare_with_ring(query, run_id, run)
        (found,) = query(f'gradiometer_run_state{{run_id="{run_id}"}} == 1')
        assert found["metric"]["state"] == state


def _compare_with_ring(query: Callable[[str], list[dict[str, Any]]], run_id: str, run: Any) -> None:
    def value(name: str, more: str = "") -> float:
        (found,) = query(f'gradiometer_{name}{{run_id="{run_id}"{more}}}')
        return float(found["value"][1])

    assert value("steps_total") == len(run) == 100
    assert value("grad_norm_last", ',rank="0"') == run.grad_norm_preclip[-1]
    assert value("grad_norm_window_max") == run.grad_norm_preclip.max()
    assert value("grad_norm_baseline") == np.median(run.grad_norm_preclip)
    assert value("grad_norm_sum") == pytest.approx(run.grad_norm_preclip.sum())
    assert value("grad_norm_bucket", ',le="4.0"') == (run.grad_norm_preclip <= 4).sum()
    assert value("clip_events_total", ',policy="clip",mode="act"') == run.clipped[:, 0].sum()
    assert value("clip_events_total", ',policy="wider",mode="shadow"') == run.clipped[:, 1].sum() > 0
    assert value("clip_threshold", ',policy="wider",mode="shadow"') == run.rows["policy_threshold"][-1, 1]
    assert value("last_step_timestamp_seconds") == pytest.approx(run.time[-1], abs=1e-3)
    norms = run.layer_norms()
    for name, expected in (("last", norms[-1]), ("window_max", norms.max(axis=0))):
        result = query(f'gradiometer_layer_grad_norm_{name}{{run_id="{run_id}"}}')
        found = {item["metric"]["layer"]: float(item["value"][1]) for item in result}
        assert found == pytest.approx(dict(zip(run.layers, expected.tolist(), strict=True)), rel=1e-8)


def test_corrupt_runs_do_no_harm(
    tmp_path: Path, start: Start, make_manifest: MakeManifest, write_run: WriteRun, wait_until: WaitUntil
) -> None:
    """Beside broken manifests and rings the good run is served; the failure is exported, listed and logged once."""
    for run_id in ("good", "cut", "foreign", "odd"):
        write_run(make_manifest(run_id, created_ns=time.time_ns()), np.ones((3, 4)))
    (tmp_path / "cut/rank-00000/manifest.json").write_text('{"format')
    (tmp_path / "foreign/rank-00000/steps.ring").write_bytes(b"\0" * 8192)
    odd = tmp_path / "odd/rank-00000/manifest.json"
    odd.write_text(json.dumps(json.loads(odd.read_text()) | {"parameters": []}))
    monitor = start()
    wait_until(lambda: monitor.state("good"))
    samples = monitor.samples()
    assert samples["gradiometer_steps_total", ("good",)] == 3
    assert samples["gradiometer_collector_success", ("poll",)] == 0
    assert samples["gradiometer_collector_success", ("runs",)] == 1
    listed = json.loads(monitor.get("/api/v1/runs")[1])["unreadable"]
    assert listed == dict.fromkeys((f"{run}/rank-00000" for run in ("cut", "foreign", "odd")), "RunFormatError")
    log = monitor.end()
    assert [log.count(f"/{run}/rank-00000 cannot") for run in ("cut", "foreign", "odd")] == [1, 1, 1]
    assert "Traceback" not in log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it_cleanly(start: Start, number: signal.Signals) -> None:
    """SIGTERM and SIGINT end the daemon with exit code 0; the log names where it served."""
    monitor = start()
    log = monitor.end(number)
    assert f"serving on {monitor.url}\n" in log
    assert "Traceback" not in log


def _refused(spawn: Spawn, tmp_path: Path, *options: str) -> tuple[int, list[str]]:
    command = (sys.executable, "-m", "gradiometer_monitor", "--dir", tmp_path)
    process = spawn(*command, *options, stderr=subprocess.PIPE)
    log = process.communicate(timeout=120)[1]
    return process.returncode, log.splitlines()


def test_taken_port_is_one_clear_line(spawn: Spawn, tmp_path: Path) -> None:
    """The error names the port and the remedy, and is no traceback."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        code, (line,) = _refused(spawn, tmp_path, "--port", port)
    assert code == 1
    assert f"port {port} of 127.0.0.1 cannot be bound" in line
    assert "--port" in line


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_open_bind_is_refused(spawn: Spawn, tmp_path: Path, host: str) -> None:
    """Without authentication nothing but loopback is served."""
    code, (line,) = _refused(spawn, tmp_path, "--port", "0", "--host", host)
    assert code == 1
    assert f"host {host!r} is not a loopback address" in line
    assert "--host 127.0.0.1" in line


def test_unresolvable_host_is_refused(spawn: Spawn, tmp_path: Path) -> None:
    """A host that is no address is told as such."""
    code, (line,) = _refused(spawn, tmp_path, "--port", "0", "--host", "no-such-host.invalid")
    assert code == 1
    assert "cannot be resolved" in line


def test_wrong_setting_is_refused(spawn: Spawn, tmp_path: Path) -> None:
    """A value out of range is told with its range."""
    code, (line,) = _refused(spawn, tmp_path, "--poll-seconds", "0")
    assert code == 2
    assert "--poll-seconds: poll_seconds is 0.0: expected a number from 0.05 to 3600" in line


def test_a_file_for_a_directory_is_refused(tmp_path: Path) -> None:
    """A root that is a file is told at once."""
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match=r"file.*is not a directory"):
        resolve(tmp_path / "file")


def test_a_missing_directory_is_warned_of(start: Start, tmp_path: Path) -> None:
    """A root that is not there yet is served, and said to be missing."""
    tmp_path.rmdir()
    monitor = start()
    assert monitor.runs() == {}
    assert f"{tmp_path} does not exist yet" in monitor.end()


def test_help_shows_the_defaults(spawn: Spawn) -> None:
    """What is in brackets in a help text is in the help."""
    process = spawn(sys.executable, "-m", "gradiometer_monitor", "--help", stdout=subprocess.PIPE)
    said = " ".join(process.communicate(timeout=60)[0].split())
    assert "[default: 9477]" in said
    assert "[env: GRADIOMETER_DIR]" in said


def test_settings_are_argument_then_environment_then_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of the three that is given wins, and a variable that is no number is named."""
    monkeypatch.setenv("GRADIOMETER_DIR", str(tmp_path))
    monkeypatch.setenv("GRADIOMETER_MONITOR_PORT", "1234")
    monkeypatch.setenv("GRADIOMETER_MONITOR_SERIES_BUDGET", "500")
    assert resolve(port=4321) == Settings(root=tmp_path, port=4321, series_budget=500)
    monkeypatch.setenv("GRADIOMETER_MONITOR_PORT", "many")
    with pytest.raises(SettingsError, match="GRADIOMETER_MONITOR_PORT: port is 'many': expected a valid integer"):
        resolve()


def test_it_needs_no_torch(spawn: Spawn) -> None:
    """Everything that the daemon loads, it loads without torch."""
    code = "import gradiometer_monitor.cli, sys; sys.exit(int('torch' in sys.modules))"
    assert spawn(sys.executable, "-c", code).wait(timeout=60) == 0
