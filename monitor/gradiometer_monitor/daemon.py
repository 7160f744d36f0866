"""The monitor as a process: threads, the HTTP server, signals, reloads, and an orderly end.

One thread polls the run directories, one reloads the config and answers to systemd's watchdog, each service has one of
its own, and uvicorn serves in the main thread. :class:`gradiometer_monitor.following.runs.Runs` holds the lock that
orders polls and scrapes.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from logging import getLogger
from pathlib import Path
from queue import Empty, SimpleQueue

from gradiometer.tail import Sample
from gradiometer_monitor import logs
from gradiometer_monitor.alerts.service import AlertService
from gradiometer_monitor.config import reloading
from gradiometer_monitor.config.resolving import Resolved
from gradiometer_monitor.config.settings import Settings, SettingsError
from gradiometer_monitor.exposition.exposition import Exposition
from gradiometer_monitor.exposition.health import collectors
from gradiometer_monitor.following.events import Events
from gradiometer_monitor.following.incidents import Incidents
from gradiometer_monitor.following.retention import RetentionService
from gradiometer_monitor.following.runs import Runs
from gradiometer_monitor.gpu.service import GpuService
from gradiometer_monitor.notify import notify, watchdog_seconds
from gradiometer_monitor.remote_write.service import RemoteWrite
from gradiometer_monitor.server import GRACE_SECONDS, Server, Switch
from gradiometer_monitor.services import Context, Service, stop_all
from gradiometer_monitor.store import Store
from gradiometer_monitor.web.app import app
from gradiometer_monitor.web.connections import server_config
from gradiometer_monitor.web.history import HistoryCache
from gradiometer_monitor.web.listen import Listener, listen
from gradiometer_monitor.web.scrape import poll_limit

__all__ = ["Daemon", "serve"]

log = getLogger(__name__)

CATCH_UP_SECONDS = 0.05
"""Pause between two polls while there is more to read, so that scrapes come in between."""

Reread = Callable[[], Resolved[Settings]]


def serve(settings: Settings, reread: Reread | None = None) -> int:
    """Serve until SIGTERM or SIGINT and return the exit code: 0, or 1 after one line that says what was refused.

    ``reread`` reads the settings again at SIGHUP. Must be called from the main thread, which alone receives signals.
    """
    logs.configure(settings.log)
    hangups: SimpleQueue[None] = SimpleQueue()  # whose put may interrupt itself, as that of an Event may not
    signal.signal(signal.SIGHUP, lambda *_: hangups.put(None))
    try:
        listener = listen(settings)
        port = listener.getsockname()[1]
        if settings.port_file:
            _write_port(settings.port_file, port)
    except (SettingsError, OSError) as error:
        log.error("%s", error)  # noqa: TRY400 - one line for the user, who is not helped by a traceback
        return 1
    if not settings.root.exists():
        log.warning("%s does not exist yet: runs are served as soon as there are some", settings.root)
    Daemon(settings, listener, hangups, reread).run()
    return 0


class Daemon:
    """One monitor, from its start to its end: the settings in force, and what was made from them."""

    def __init__(
        self, settings: Settings, listener: Listener, hangups: SimpleQueue[None], reread: Reread | None = None
    ) -> None:
        self.settings = settings
        store = Store.open(settings.state)
        runs = Runs(settings.root, retention_seconds=settings.retention_seconds, store=store)
        self.context = Context(runs=runs, events=Events(runs, store), store=store)
        budgets = {"series_budget": settings.series_budget, "total_series": settings.total_series}
        self.exposition = Exposition(runs, **budgets, layers=settings.layers)
        self.services = _services(settings, self.context)
        self._listener, self._hangups, self._reread = listener, hangups, reread
        self._stop, self._poll_now = threading.Event(), threading.Event()
        self._reloaded, self._reloaded_at = True, time.time()
        self._history = HistoryCache()
        self._app = app(self.context, self.exposition, settings, self._history)
        self._switch = Switch(self._app)
        self._server = Server(
            server_config(self._switch, settings, listener), serving=self._serving, stopping=self._stopping
        )
        self._threads = [
            threading.Thread(target=work, name=f"gradiometer-{name}", daemon=True)
            for name, work in (("poll", self._poll), ("keep", self._keep))
        ]

    def run(self) -> None:
        """Serve until the server ends; then end everything else, within some seconds, whatever it is doing."""
        self._collect()
        for thread in self._threads:
            thread.start()
        for service in self.services:
            service.start()
        try:
            self._server.take_signals()
            self._server.run(sockets=[self._listener])
        finally:
            self._end()

    def samples(self) -> Iterator[Sample]:
        """Yield what the monitor tells of itself."""
        yield "gradiometer_config_last_reload_successful", (), int(self._reloaded)
        yield "gradiometer_config_last_reload_success_timestamp_seconds", (), self._reloaded_at
        yield "gradiometer_log_messages_dropped_total", (), logs.dropped()

    @property
    def healthy(self) -> bool:
        """Whether polls are done, and requests served, as often as they should be."""
        oldest = min(self.context.runs.polled_at, self._server.ticked_at)
        return time.monotonic() - oldest <= poll_limit(self.settings)

    def apply(self, wanted: Settings) -> None:
        """Change to other settings, as far as that can be done now. Raises what building from them raises."""
        new = reloading.keep_fixed(self.settings, wanted)
        changed = reloading.changed(self.settings, new)
        if not changed:
            self._app.state.streams.hang_up()  # a token may have been taken away
            log.info("the settings were read again: none has changed")
            return
        # All is built before anything is replaced: what cannot be built leaves the monitor as it was.
        made, served = _services(new, self.context), app(self.context, self.exposition, new, self._history)
        self._app.state.streams.close()  # their clients come again, and are asked who they are
        self._app = served
        logs.configure(new.log)
        self.settings, self._switch.app, self._listener.gate.limits = new, served, new.limits
        self.context.runs.retention_seconds = new.retention_seconds
        self.exposition.change_budgets(new.series_budget, new.total_series, new.layers)
        self.services = reloading.replace(self.services, made, changed)
        self._collect()
        self._poll_now.set()
        log.info("the settings were read again: changed %s", ", ".join(sorted(changed)))

    def _collect(self) -> None:
        self.exposition.collect_from({"monitor": self.samples} | collectors(self.services))

    def _serving(self) -> None:
        scheme = "https" if self.settings.auth.tls_certificate else "http"
        host = f"[{self.settings.host}]" if ":" in self.settings.host else self.settings.host
        url = f"{scheme}://{host}:{self._listener.getsockname()[1]}"
        log.info("serving on %s", url)
        log.info("metrics at %s/metrics, runs of %s at %s/api/v1/runs", url, self.settings.root, url)
        notify("READY=1", f"STATUS=serving on {url}")

    def _stopping(self) -> None:
        if not self._stop.is_set():
            log.info("stopping: %s", self._server.ended_by or "the server has ended by itself")
        notify("STOPPING=1")
        self._app.state.streams.close()
        self._stop.set()
        self._poll_now.set()
        self._hangups.put(None)
        for service in self.services:
            service.ask_to_stop()

    def _end(self) -> None:
        """Wait for the threads; the process goes without those that do not end."""
        self._stopping()
        deadline = time.monotonic() + GRACE_SECONDS
        for thread in (*self._threads, *_held_by()):
            thread.join(max(0.0, deadline - time.monotonic()))
        stop_all(self.services, max(0.5, deadline - time.monotonic()))
        self._listener.close()
        left = {thread.name for thread in self._threads if thread.is_alive()}
        left |= {f"gradiometer-{service.name}" for service in self.services if service.alive}
        left |= {thread.name for thread in _held_by()}
        if left:
            log.warning("ended without waiting longer for %s", ", ".join(sorted(left)))
            os._exit(0)  # what they use stays open under them, and none holds the interpreter up
        self.context.runs.close()
        self.context.store.close()
        log.info("ended")

    def _keep(self) -> None:
        """Reload when asked to, and tell systemd's watchdog that all is well as long as it is."""
        interval = watchdog_seconds()
        while not self._stop.is_set():
            try:
                self._hangups.get(timeout=interval)
                while not self._hangups.empty():  # asked to several times, once is enough
                    self._hangups.get_nowait()
                if not self._stop.is_set():
                    self._reload()
            except Empty:
                pass
            if interval is not None and self.healthy:
                notify("WATCHDOG=1")

    def _reload(self) -> None:
        notify("RELOADING=1")
        reloaded_at = None
        try:
            if self._reread is not None:
                resolved = self._reread()
                for warning in resolved.warnings:
                    log.warning("%s", warning)
                self.apply(resolved.settings)
            reloaded_at = time.time()
        except SettingsError as error:
            said = "; ".join(str(error).splitlines())
            log.error("reload refused, all settings stay as they were: %s", said)  # noqa: TRY400 - as in serve()
        except Exception:  # whatever a wrong setting leads to, the monitor goes on with the old ones
            log.exception("reload failed, all settings stay as they were")
        self._reloaded = reloaded_at is not None  # before its time: who sees that sees that it succeeded
        self._reloaded_at = reloaded_at or self._reloaded_at
        notify("READY=1")

    def _poll(self) -> None:
        pause, runs, incidents = 0.0, self.context.runs, Incidents(self.context.runs, self.context.events)
        while not self._stop.is_set():
            self._poll_now.wait(pause)
            self._poll_now.clear()
            pause = self.settings.poll_seconds
            try:
                if runs.poll():
                    pause = min(CATCH_UP_SECONDS, pause)
                if self.context.events.follow():
                    pause = min(CATCH_UP_SECONDS, pause)
                incidents.follow()
                self.context.store.try_again()
            except Exception:  # the thread must outlive whatever one poll met
                runs.poll_succeeded = False
                log.exception("a poll of %s failed and will be tried again", runs.root)


def _held_by() -> list[threading.Thread]:
    """Return the threads that an ordinary end of the process would wait for, as the workers of requests."""
    return [each for each in threading.enumerate() if not each.daemon and each is not threading.main_thread()]


def _services(settings: Settings, context: Context) -> list[Service]:
    """Build the services that the settings ask for."""
    services: list[Service] = [RetentionService(settings.retention, context)]
    if settings.gpu.enabled:
        services.append(GpuService(settings.gpu, context))
    if settings.grafana is not None:
        from gradiometer_monitor.grafana.service import GrafanaService  # slow to load, and most monitors have none

        services.append(GrafanaService(settings.grafana, context))
    if settings.alerts is not None:
        services.append(AlertService(settings.alerts, context))
    services += [RemoteWrite(receiver, context) for receiver in settings.remote_write]
    return services


def _write_port(path: Path, port: int) -> None:
    """Write atomically: whoever waits for the file finds a whole number in it."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(f"{port}\n")
    temporary.replace(path)
