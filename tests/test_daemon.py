"""The monitor as a daemon: reloads, an end that waits for nobody, words to systemd, and logs that nobody can forge."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gradiometer_monitor import logs
from gradiometer_monitor.config import reloading
from gradiometer_monitor.config.settings import Settings, SettingsError
from gradiometer_monitor.logs import LogSettings, configure, escape
from gradiometer_monitor.notify import notify, watchdog_seconds
from gradiometer_monitor.services import Service
from gradiometer_monitor.web.settings import AuthSettings
from tests._monitor import Monitor
from tests._web import replace_config

if TYPE_CHECKING:
    from tests.conftest import MakeManifest, Spawn, Start, WaitUntil, WriteRun

RELOADED = "gradiometer_config_last_reload_successful"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Give the path of an empty config beside the runs' directory."""
    path = tmp_path.with_name(f"{tmp_path.name}.yaml")
    path.write_text("")
    return path


def _reload(monitor: Monitor, wait_until: WaitUntil, *, succeeds: bool = True) -> None:
    """Have the monitor reload, and wait until that succeeded, or was refused."""
    name = "gradiometer_config_last_reload_success_timestamp_seconds"
    before = monitor.samples()[name, ()]
    monitor.process.send_signal(signal.SIGHUP)
    if succeeds:
        wait_until(lambda: monitor.samples()[name, ()] > before)
    else:
        wait_until(lambda: monitor.samples()[RELOADED, ()] == 0)


def test_a_reload_takes_effect(
    start: Start, config: Path, wait_until: WaitUntil, write_run: WriteRun, make_manifest: MakeManifest
) -> None:
    """A budget, the log's level and its format are changed while the monitor serves; what needs a restart is named."""
    write_run(make_manifest("run", layers=[f"layer{n}" for n in range(200)]), [[1.0] * 200])
    config.write_text("series_budget: 5000\n")
    monitor = start("--config", str(config))
    assert ("gradiometer_layer_grad_norm_last", ("run", "layer199")) in monitor.samples()
    config.write_text("series_budget: 100\nport: 1234\nstate_dir: elsewhere\nlog: {level: warning, format: json}\n")
    _reload(monitor, wait_until)
    samples = monitor.samples()
    assert samples[RELOADED, ()] == 1
    assert sum(1 for name, _ in samples if name == "gradiometer_layer_grad_norm_last") < 200
    assert monitor.get("/-/healthy")[0] == 200
    log = monitor.end()
    assert "only a restart changes state_dir: stays as it was" in log
    assert "the settings were read again" not in log


def test_a_reload_of_what_is_wrong_changes_nothing(start: Start, config: Path, wait_until: WaitUntil) -> None:
    """One error says all that is wrong, the monitor goes on, the metric tells; the next right reload mends it."""
    monitor = start("--config", str(config))
    config.write_text("prot: 1\nlog: {format: xml}\n")
    _reload(monitor, wait_until, succeeds=False)
    assert monitor.get("/api/v1/runs")[0] == 200
    config.write_text("log: {level: debug}\n")
    _reload(monitor, wait_until)
    assert monitor.samples()[RELOADED, ()] == 1
    log = monitor.end()
    (line,) = (line for line in log.splitlines() if " ERROR " in line)
    assert "reload refused" in line
    assert f"{config}:1:7: prot: no such setting" in line
    assert f"{config}:2:15: log.format is 'xml'" in line
    assert "the settings were read again: changed log" in log


def test_a_storm_of_reloads_among_scrapes(start: Start, config: Path, wait_until: WaitUntil) -> None:
    """Two hundred SIGHUPs with changing settings among scrapes: each is answered, and none harms the other."""
    monitor = start("--config", str(config))
    for turn in range(200):
        if turn % 20 == 0:
            replace_config(config, f"series_budget: {1000 + turn}\nretention_seconds: {900 + turn}\n")
        monitor.process.send_signal(signal.SIGHUP)
        if turn % 10 == 0:
            assert monitor.get("/metrics")[0] == 200
    _reload(monitor, wait_until)
    log = monitor.end()
    assert "changed retention_seconds, series_budget" in log
    assert "Traceback" not in log
    assert "ERROR" not in log


class _Counted(Service):
    name = "counted"

    def __init__(self, name: str, sections: tuple[str, ...]) -> None:
        super().__init__()
        self.name, self.sections, self.closed = name, sections, False

    def work(self) -> float:
        return 3600.0

    def close(self) -> None:
        self.closed = True


def test_only_what_changed_is_built_anew() -> None:
    """A service whose section did not change goes on; one whose did, or that names none, is replaced."""
    old = [
        _Counted("gpu", ("gpu",)),
        _Counted("grafana", ("grafana",)),
        _Counted("any", ()),
        _Counted("gone", ("gpu",)),
    ]
    made = [
        _Counted("gpu", ("gpu",)),
        _Counted("grafana", ("grafana",)),
        _Counted("any", ()),
        _Counted("new", ("log",)),
    ]
    for service in old:
        service.start()
    now: list[Service] = reloading.replace(old, made, {"grafana"})
    try:
        assert now == [old[0], made[1], made[2], made[3]]
        assert [service.closed for service in old] == [False, True, True, True]
        assert all(service.alive for service in now)
    finally:
        for each in now:
            each.stop()


def test_tokens_are_not_taken_away_from_an_open_monitor(tmp_path: Path) -> None:
    """A reload cannot turn a monitor that others reach into one that lets everyone in."""
    old = Settings(root=tmp_path, host="192.0.2.1", auth=AuthSettings(tokens_file=tmp_path / "tokens"))
    with pytest.raises(SettingsError, match=r"auth\.tokens_file is taken away"):
        reloading.keep_fixed(old, Settings(root=tmp_path, host="192.0.2.1"))
    assert reloading.keep_fixed(old, old.model_copy(update={"port": 1})) == old


STUCK = """
import sys, time
from pathlib import Path
from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Route
import gradiometer_monitor.daemon as daemon
from gradiometer_monitor.services import Service
from gradiometer_monitor.config.settings import resolve
from gradiometer_monitor.web.stream import Streams

class Stuck(Service):
    name = "stuck"
    def work(self):
        time.sleep(600)

async def endless():
    import asyncio
    while True:
        yield b"data: 1\\n\\n"
        await asyncio.sleep(0.05)

def hang(request):
    time.sleep(600)

daemon._services = lambda settings, context: [Stuck()]
daemon.GRACE_SECONDS = float(sys.argv[3])
routes = [Route("/stream", lambda request: StreamingResponse(endless())), Route("/hang", hang)]
served = Starlette(routes=routes)
served.state.streams = Streams()
daemon.app = lambda *arguments: served
sys.exit(daemon.serve(resolve(Path(sys.argv[1]), port=0, port_file=Path(sys.argv[2]))))
"""
"""A monitor with a stream without end, a request that never returns, and a service that does not heed its end.

It waits for them for as many seconds as it is told.
"""


def _port(path: Path, wait_until: WaitUntil) -> int:
    wait_until(path.exists)
    return int(path.read_text())


def test_the_end_waits_for_nobody(spawn: Spawn, tmp_path: Path, wait_until: WaitUntil) -> None:
    """With a stream, half a request, a request that hangs and a service that hangs, SIGTERM still ends it with 0."""
    process = spawn(sys.executable, "-c", STUCK, tmp_path, tmp_path / "port", "3", stderr=subprocess.PIPE)
    address = ("127.0.0.1", _port(tmp_path / "port", wait_until))
    with socket.create_connection(address) as stream, socket.create_connection(address) as half:
        stream.sendall(b"GET /stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert stream.recv(15) == b"HTTP/1.1 200 OK"
        half.sendall(b"GET / HTTP/1.1\r\nHo")
        with socket.create_connection(address) as hanging:
            hanging.sendall(b"GET /hang HTTP/1.1\r\nHost: localhost\r\n\r\n")
            process.terminate()
            log = process.communicate(timeout=60)[1]
    assert process.returncode == 0
    assert "gradiometer-stuck" in log
    assert "Traceback" not in log


def test_the_end_waits_for_the_workers_of_requests(spawn: Spawn, tmp_path: Path, wait_until: WaitUntil) -> None:
    """A monitor that was asked something and is idle ends without a word of what it did not wait for."""
    command = (sys.executable, "-m", "gradiometer_monitor", "--dir", tmp_path, "--port", "0")
    process = spawn(*command, "--port-file", tmp_path / "port", stderr=subprocess.PIPE)
    port = _port(tmp_path / "port", wait_until)
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(urllib.request.urlopen, f"http://127.0.0.1:{port}/api/v1/runs") for _ in range(32)]
    assert {each.result().status for each in asked} == {200}
    process.terminate()
    assert "without waiting" not in process.communicate(timeout=60)[1]
    assert process.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_log_says_what_ended_it(start: Start, number: signal.Signals) -> None:
    """The signal is named once, and the last line is that of an end in order."""
    monitor = start()
    monitor.process.send_signal(number)
    lines = monitor.process.communicate(timeout=60)[1].splitlines()
    assert monitor.process.returncode == 0
    assert [line.partition("Z ")[2] for line in lines if "stopping" in line] == [f"INFO stopping: {number.name}"]
    assert lines[-1].endswith("Z INFO ended")


def test_the_second_signal_ends_it_at_once(spawn: Spawn, tmp_path: Path, wait_until: WaitUntil) -> None:
    """Who says it twice does not want to wait: the process goes with the code of the signal."""
    process = spawn(sys.executable, "-c", STUCK, tmp_path, tmp_path / "port", "600", stderr=subprocess.PIPE)
    with socket.create_connection(("127.0.0.1", _port(tmp_path / "port", wait_until))) as stream:
        stream.sendall(b"GET /stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert stream.recv(15) == b"HTTP/1.1 200 OK"
        process.terminate()
        wait_until(lambda: _refuses(tmp_path / "port"))
        process.terminate()
        assert process.wait(timeout=30) == 128 + signal.SIGTERM


def _refuses(port_file: Path) -> bool:
    """Tell whether the monitor has stopped listening, which is the first thing that it does at its end."""
    try:
        socket.create_connection(("127.0.0.1", int(port_file.read_text())), timeout=20).close()
    except ConnectionRefusedError:
        return True
    return False


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Give the socket of a service manager that listens, and let the environment name it."""
    path = tmp_path.with_name("notify.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(path))
        listener.settimeout(30)
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))
        yield listener
    path.unlink()


def _heard(manager: socket.socket, word: str) -> str:
    """Wait for the datagram that has a line ``word``."""
    while word not in (said := manager.recv(4096).decode()).splitlines():
        pass
    return said


def test_systemd_is_told(start: Start, manager: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ready once it serves, its health as often as it is asked for, reloads, and that it stops."""
    monkeypatch.setenv("WATCHDOG_USEC", "500000")
    monitor = start()
    assert f"STATUS=serving on {monitor.url}" in _heard(manager, "READY=1")
    _heard(manager, "WATCHDOG=1")
    monitor.process.send_signal(signal.SIGHUP)
    assert re.search(r"^MONOTONIC_USEC=\d+$", _heard(manager, "RELOADING=1"), re.MULTILINE)
    _heard(manager, "READY=1")
    monitor.process.terminate()
    _heard(manager, "STOPPING=1")


def test_abstract_sockets_and_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket in the abstract namespace is one too; without one nothing happens, and one that is gone does no harm."""
    name = f"gradiometer-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(f"\0{name}")
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        notify("READY=1")
        assert listener.recv(100) == b"READY=1"
    notify("READY=1")
    monkeypatch.delenv("NOTIFY_SOCKET")
    notify("READY=1")


@pytest.mark.parametrize(
    ("allowed", "process", "seconds"),
    [("4000000", "", 2.0), ("4000000", "1", None), ("", "", None), ("0", "", None), ("soon", "", None)],
)
def test_watchdog(monkeypatch: pytest.MonkeyPatch, allowed: str, process: str, seconds: float | None) -> None:
    """The watchdog is fed twice in its time, if it is this process that it watches."""
    monkeypatch.setenv("WATCHDOG_USEC", allowed)
    monkeypatch.setenv("WATCHDOG_PID", process)
    assert watchdog_seconds() == seconds


@pytest.fixture
def log_lines(capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """Give a function that returns what was logged, and put the loggers back."""
    kept = {name: (logging.getLogger(name).handlers[:], logging.getLogger(name).level) for name in logs.LOGGERS}
    yield lambda: capsys.readouterr().err.splitlines()
    for name, (handlers, level) in kept.items():
        logger = logging.getLogger(name)
        logger.handlers[:], logger.propagate = handlers, True
        logger.setLevel(level)


HOSTILE = "run\n2026-01-01T00:00:00.000Z ERROR forged\x1b[2J\u202e"


@pytest.mark.parametrize("form", ["text", "json"])
def test_nobody_forges_a_line(log_lines: Any, form: Any) -> None:
    """Ends of lines and terminal controls in names, messages and tracebacks begin no line, in either format."""
    configure(LogSettings(format=form))
    log = logging.getLogger("gradiometer_monitor.test")
    log.warning("run %s is odd", HOSTILE, extra={"run_id": HOSTILE})
    try:
        int(HOSTILE)
    except ValueError:
        log.exception("failed")
    lines = log_lines()
    assert all(line.isprintable() for line in lines)
    if form == "json":
        first, second = map(json.loads, lines)
        assert (first["level"], first["logger"], first["run_id"]) == ("warning", log.name, HOSTILE)
        assert first["message"] == f"run {HOSTILE} is odd"
        assert "ValueError: invalid literal" in second["exception"]
    else:
        assert lines[0].endswith(f"Z WARNING run {escape(HOSTILE)} is odd")
        assert [line for line in lines if not line.startswith("    ")] == lines[:2]


def test_what_is_said_again_and_again_is_bounded(log_lines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a message that repeats a few are logged; the first of the next minute tells how many were not."""
    configure(LogSettings())
    log, before = logging.getLogger("gradiometer_monitor.test"), logs.dropped()
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for _ in range(50):
        log.warning("again")
    for number in range(300):
        log.warning("run %d", number)
    lines = log_lines()
    assert sum(line.endswith(" again") for line in lines) == logs.SAME_MESSAGES
    assert sum(" run " in line for line in lines) == logs.SAME_KIND
    assert logs.dropped() - before == 50 - logs.SAME_MESSAGES + 300 - logs.SAME_KIND
    monkeypatch.setattr(time, "monotonic", lambda: now + 61)
    log.warning("again")
    assert log_lines()[0].endswith(f" again (and {50 - logs.SAME_MESSAGES} times more that were not logged)")


def test_the_servers_words_have_the_same_form(log_lines: Any) -> None:
    """What uvicorn warns of is in the format and on the stream of the rest, and what it merely says is not."""
    configure(LogSettings(format="json", level="debug"))
    logging.getLogger("uvicorn.error").info("Started server process")
    logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
    (line,) = log_lines()
    assert json.loads(line)["message"] == "Invalid HTTP request received."
