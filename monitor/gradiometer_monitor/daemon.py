"""The monitor as a process: threads, the HTTP server, signals, and an orderly end.

One thread polls the run directories, each service has one of its own, and uvicorn serves in the main thread.
:class:`gradiometer_monitor.runs.Runs` holds the lock that orders polls and scrapes.
"""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable
from ipaddress import ip_address
from logging import getLogger
from pathlib import Path

import uvicorn

from gradiometer_monitor.events import Events
from gradiometer_monitor.exposition import Exposition
from gradiometer_monitor.incidents import Incidents
from gradiometer_monitor.runs import Runs
from gradiometer_monitor.services import Context, Service
from gradiometer_monitor.settings import Settings, SettingsError
from gradiometer_monitor.store import Store
from gradiometer_monitor.web.app import app

__all__ = ["serve"]

log = getLogger(__name__)

CONNECTIONS = 64
"""Connections served at once; one more is told 503."""
GRACE_SECONDS = 5
CATCH_UP_SECONDS = 0.05
"""Pause between two polls while there is more to read, so that scrapes come in between."""


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
    store = Store.open(settings.state)
    runs = Runs(settings.root, retention_seconds=settings.retention_seconds, store=store)
    context = Context(runs=runs, events=Events(runs, store), store=store)
    services = _services(settings, context)
    stop = threading.Event()
    poller = threading.Thread(target=_poll, args=(context, settings.poll_seconds, stop), name="gradiometer-poll")
    poller.start()
    for service in services:
        service.start()
    try:
        _serve_http(context, services, settings, listener)
    finally:
        stop.set()
        for service in services:
            service.stop(GRACE_SECONDS)
        poller.join(GRACE_SECONDS)
        runs.close()
        store.close()
        listener.close()
    return 0


def _services(settings: Settings, context: Context) -> list[Service]:
    """Build the services that the settings ask for."""
    del settings, context
    return []


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


class _Server(uvicorn.Server):
    """Ends what would last for ever before it waits for the requests that are being answered."""

    before_shutdown: Callable[[], None]

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.before_shutdown()
        await super().shutdown(sockets)


def _serve_http(context: Context, services: list[Service], settings: Settings, listener: socket.socket) -> None:
    exposition = Exposition(context.runs, series_budget=settings.series_budget)
    exposition.collect_from({service.name: service.samples for service in services})
    application = app(context, exposition, settings)
    config = uvicorn.Config(
        application,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    server = _Server(config)
    server.before_shutdown = application.state.streams.close
    # uvicorn raises the signal again once it has stopped: it must find this handler, not the default that kills.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, server.handle_exit)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{host}:{listener.getsockname()[1]}"
    log.info("serving on %s", url)
    log.info("metrics at %s/metrics, runs of %s at %s/api/v1/runs", url, settings.root, url)
    server.run(sockets=[listener])


def _poll(context: Context, poll_seconds: float, stop: threading.Event) -> None:
    pause, runs, incidents = 0.0, context.runs, Incidents(context.runs, context.events)
    while not stop.wait(pause):
        pause = poll_seconds
        try:
            if runs.poll():
                pause = min(CATCH_UP_SECONDS, poll_seconds)
            if context.events.follow():
                pause = min(CATCH_UP_SECONDS, poll_seconds)
            incidents.follow()
        except Exception:  # the thread must outlive whatever one poll met
            runs.poll_succeeded = False
            log.exception("a poll of %s failed and will be tried again", runs.root)
