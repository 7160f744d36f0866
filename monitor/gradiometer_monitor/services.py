"""What a monitor does besides following and serving: services, each in a thread of its own, none in another's way.

A service is built from its section of the settings. When a reload changes that section, the service is stopped and
built anew: whatever must outlive that is in the store. A reload may build one and not start it, so building has no
effect that must be undone: what a service opens, it opens in its first round.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from logging import getLogger

from gradiometer.tail import Sample
from gradiometer_monitor.alerts.desk import Desk
from gradiometer_monitor.following.events import Events
from gradiometer_monitor.following.runs import Runs
from gradiometer_monitor.store import Store

__all__ = ["Context", "Service", "stop_all"]

log = getLogger(__name__)

JOIN_SECONDS = 5.0
RETRY_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """What services and handlers of requests share."""

    runs: Runs
    events: Events
    store: Store
    alerts: Desk = field(default_factory=Desk)


class Service(ABC):
    """Work that is done again and again in a thread of its own, until :meth:`stop`.

    A round that raises is logged, once until one succeeds, counted, and tried again.
    """

    name: str
    """In metrics, logs and the thread's name; no two services of a monitor have the same."""
    sections: tuple[str, ...] = ()
    """Settings that it is built from, by their names in Settings: a reload that changes one of them builds it anew. One
    that names none is built anew whenever any setting changes."""

    def __init__(self) -> None:
        self.failures = 0
        """Rounds that raised."""
        self.healthy = True
        """Whether the last round did not raise."""
        self._stop, self._wake = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    @abstractmethod
    def work(self) -> float:
        """Do what there is to do; return after how many seconds to do it again. :attr:`stopping` must be heeded."""

    def samples(self) -> Iterable[Sample]:
        """Give the samples of this service for a scrape; called from other threads, and must not wait."""
        return ()

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Let go of what the service holds; called once, in its thread, after the last round."""

    @property
    def stopping(self) -> threading.Event:
        """Set when the service is to end; what waits should wait for this."""
        return self._stop

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name=f"gradiometer-{self.name}", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Begin the next round now."""
        self._wake.set()

    def ask_to_stop(self) -> None:
        """Have the thread end after the round that it is in, without waiting for it."""
        self._stop.set()
        self._wake.set()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def stop(self, seconds: float = JOIN_SECONDS) -> None:
        """End the thread and wait for it; a service that does not end in time is left behind with a warning."""
        self.ask_to_stop()
        if self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                log.warning("%s did not end within %g s and is left behind", self.name, seconds)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.clear()
            if self._stop.is_set():  # whose call to wake up may just have been cleared
                break
            self._wake.wait(self._round())
        self.close()

    def _round(self) -> float:
        try:
            seconds = self.work()
        except Exception as error:  # a service must outlive whatever one round met
            self.failures += 1
            if self.healthy:
                said = "%s failed, says so once until it succeeds, and will be tried again: %s"
                foreseen = isinstance(error, PermissionError)
                log.error(said, self.name, error, exc_info=not foreseen)  # noqa: TRY400 - one line will do for that
            else:
                log.debug("%s failed again: %s", self.name, error)
            self.healthy = False
            return RETRY_SECONDS
        if not self.healthy:
            log.info("%s succeeds again", self.name)
        self.healthy = True
        return seconds


def stop_all(services: Iterable[Service], seconds: float = JOIN_SECONDS) -> None:
    """End several services at the same time, which together have ``seconds`` for it."""
    ending, deadline = list(services), time.monotonic() + seconds
    for service in ending:
        service.ask_to_stop()
    for service in ending:
        service.stop(max(0.0, deadline - time.monotonic()))
