"""The monitor as a process: settings, the polling thread, the HTTP server, and an orderly end.

One thread polls the run directories; uvicorn serves in the main thread. :class:`gradiometer_monitor.runs.Runs` holds
the lock that orders the two.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address
from logging import getLogger
from pathlib import Path
from typing import Any

import uvicorn

from gradiometer.records import default_root
from gradiometer_monitor.exposition import Exposition
from gradiometer_monitor.http import app
from gradiometer_monitor.runs import Runs

__all__ = ["Settings", "SettingsError", "resolve", "serve"]

log = getLogger(__name__)

CONNECTIONS = 64
"""Connections served at once; one more is told 503."""
GRACE_SECONDS = 5
CATCH_UP_SECONDS = 0.05
"""Pause between two polls while there is more to read, so that scrapes come in between."""


class SettingsError(ValueError):
    """A setting is out of its range, or asks for what is refused."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How the monitor runs; raises :class:`SettingsError` for a value out of range."""

    root: Path
    host: str = "127.0.0.1"
    port: int = 9477
    """0 takes a free one: see the log, or ``port_file``."""
    poll_seconds: float = 1.0
    series_budget: int = 10_000
    """Series that one run may have in a scrape."""
    retention_seconds: float = 900.0
    """How long the series of a run that is over stay after its last heartbeat."""
    port_file: Path | None = None
    """Where to write the port once it is bound, for whoever started the monitor with port 0."""

    def __post_init__(self) -> None:
        if self.root.exists() and not self.root.is_dir():
            raise SettingsError(f"dir is {self.root}, which is not a directory: give the one that holds the runs")
        _check("port", self.port, 0, 65535)
        _check("poll_seconds", self.poll_seconds, 0.05, 3600)
        _check("series_budget", self.series_budget, 100, 10_000_000)
        _check("retention_seconds", self.retention_seconds, 0, 366 * 86400)


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise SettingsError(f"{name} {value!r}: expected a number from {low} to {high}")


def resolve(root: Path | None = None, **arguments: Any) -> Settings:
    """Resolve the settings: an argument that is not None, else ``GRADIOMETER_MONITOR_<NAME>``, else the default.

    The root's variable is ``GRADIOMETER_DIR``. Raises :class:`SettingsError`.
    """
    readers: dict[str, Callable[[str], Any]] = {
        "host": str,
        "port": int,
        "poll_seconds": float,
        "series_budget": int,
        "retention_seconds": float,
        "port_file": Path,
    }
    chosen = {name: value for name, value in arguments.items() if value is not None}
    for name, read in readers.items():
        variable = f"GRADIOMETER_MONITOR_{name.upper()}"
        if name not in chosen and (text := os.environ.get(variable)):
            try:
                chosen[name] = read(text)
            except ValueError as error:
                raise SettingsError(f"{variable} {text!r}: expected {read.__name__}") from error
    return Settings(root=default_root(root), **chosen)


def serve(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT and return the exit code: 0, or 1 after one line that says what was refused.

    Must be called from the main thread, which alone receives signals.
    """
    try:
        listener = _listen(settings.host, settings.port)
        port = listener.getsockname()[1]
        if settings.port_file:
            _write_port(settings.port_file, port)
    except (SettingsError, OSError) as error:
        log.error("%s", error)  # noqa: TRY400 - one line for the user, who is not helped by a traceback
        return 1
    if not settings.root.exists():
        log.warning("%s does not exist yet: runs are served as soon as there are some", settings.root)
    runs = Runs(settings.root, retention_seconds=settings.retention_seconds)
    stop = threading.Event()
    poller = threading.Thread(target=_poll, args=(runs, settings.poll_seconds, stop), name="gradiometer-poll")
    poller.start()
    try:
        _serve_http(runs, settings, listener)
    finally:
        stop.set()
        poller.join(GRACE_SECONDS)
        runs.close()
        listener.close()
    return 0


def _listen(host: str, port: int) -> socket.socket:
    """Bind ``host``, which must be loopback. Raises SettingsError or OSError, with the remedy."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except socket.gaierror as error:
        raise SettingsError(f"host {host!r} cannot be resolved ({error.strerror}): try --host 127.0.0.1") from error
    if not ip_address(str(address[0]).partition("%")[0]).is_loopback:
        raise SettingsError(
            f"host {host!r} is not a loopback address: the monitor has no authentication yet, so it serves this host "
            "only; use --host 127.0.0.1 and put an authenticating proxy in front of it"
        )
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(CONNECTIONS)
    except OSError as error:
        listener.close()
        raise OSError(
            f"port {port} of {host} cannot be bound ({error.strerror}): stop the process that uses it, or choose "
            "another with --port (0 takes a free one)"
        ) from error
    return listener


def _write_port(path: Path, port: int) -> None:
    """Write atomically: whoever waits for the file finds a whole number in it."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(f"{port}\n")
    temporary.replace(path)


def _serve_http(runs: Runs, settings: Settings, listener: socket.socket) -> None:
    exposition = Exposition(runs, series_budget=settings.series_budget)
    config = uvicorn.Config(
        app(runs, exposition, host=settings.host, poll_seconds=settings.poll_seconds),
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    server = uvicorn.Server(config)
    # uvicorn raises the signal again once it has stopped: it must find this handler, not the default that kills.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, server.handle_exit)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{host}:{listener.getsockname()[1]}"
    log.info("serving on %s", url)
    log.info("metrics at %s/metrics, runs of %s at %s/api/v1/runs", url, settings.root, url)
    server.run(sockets=[listener])


def _poll(runs: Runs, poll_seconds: float, stop: threading.Event) -> None:
    pause = 0.0
    while not stop.wait(pause):
        pause = poll_seconds
        try:
            if runs.poll():
                pause = min(CATCH_UP_SECONDS, poll_seconds)
        except Exception:  # the thread must outlive whatever one poll met
            runs.poll_succeeded = False
            log.exception("a poll of %s failed and will be tried again", runs.root)
