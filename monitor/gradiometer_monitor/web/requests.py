"""Count the requests that were answered, by the route and the status: both from small fixed sets."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gradiometer.tail import Sample

__all__ = ["CountRequests", "RequestCounts"]

UNKNOWN = "other"
"""Path of a request that no route took."""


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


class CountRequests:
    """ASGI middleware that counts in ``counts``."""

    def __init__(self, app: ASGIApp, counts: RequestCounts) -> None:
        self._app, self._counts = app, counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve, and count when the answer begins."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._counts.add(_path(scope), message["status"])
            await send(message)

        await self._app(scope, receive, counted)


def _path(scope: Scope) -> str:
    """Return the path of the route that took the request, with the names of its parameters in place of values."""
    if "route" in scope:
        return str(getattr(scope["route"], "path", UNKNOWN))
    routes = scope["app"].routes if "endpoint" in scope else ()  # older Starlettes name the endpoint alone
    return next((route.path for route in routes if getattr(route, "endpoint", None) is scope["endpoint"]), UNKNOWN)
