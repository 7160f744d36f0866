"""Count the requests that were answered, by the route and the status: both from small fixed sets."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gradiometer_monitor.exposition.health import RequestCounts

__all__ = ["CountRequests"]

UNKNOWN = "other"
"""Path of a request that no route took."""


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
