"""How the monitor itself is: its services, its store and what it is asked, as samples."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain

from gradiometer.tail import Sample
from gradiometer_monitor.services import Service
from gradiometer_monitor.store import Store

__all__ = ["RequestCounts", "collectors", "store_samples"]


def collectors(services: Sequence[Service]) -> dict[str, Callable[[], Iterable[Sample]]]:
    """Map the names of collectors to what gives their samples: one a name of a service, and one for their health."""
    named: dict[str, list[Service]] = {}
    for service in services:
        named.setdefault(service.name, []).append(service)
    found: dict[str, Callable[[], Iterable[Sample]]] = {
        name: partial(_samples, members) for name, members in named.items()
    }
    return found | {"services": partial(_health, named)}


def _samples(services: list[Service]) -> Iterable[Sample]:
    return chain.from_iterable(service.samples() for service in services)


def _health(named: dict[str, list[Service]]) -> Iterator[Sample]:
    for name, members in named.items():
        yield "gradiometer_service_healthy", (name,), int(all(service.healthy for service in members))
        yield "gradiometer_service_failures_total", (name,), sum(service.failures for service in members)


def store_samples(store: Store) -> Iterator[Sample]:
    """Yield what is known of the store without asking its file."""
    yield "gradiometer_store_persistent", (), int(store.persistent)


class RequestCounts:
    """How many requests were answered; safe to use from several threads."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()

    def add(self, path: str, status: int) -> None:
        """Count one request."""
        with self._lock:
            self._counts[path, str(status)] += 1

    def samples(self) -> Iterator[Sample]:
        """Yield one sample for each route and status that there was."""
        with self._lock:
            counts = dict(self._counts)
        for labels, count in counts.items():
            yield "gradiometer_http_requests_total", labels, count
