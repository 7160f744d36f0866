"""The ASGI application: which paths there are, and what every request passes through.

Handlers that need the lock of the runs are plain functions, which run in a bounded pool of threads; the probes need
neither, so that they answer when everything else waits. A request whose Host is not this host's is refused: a page of
the web could otherwise read the metrics, by a name that resolves to loopback.
"""

from __future__ import annotations

from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware

from gradiometer.records import installed_version
from gradiometer_monitor.exposition import Exposition
from gradiometer_monitor.services import Context
from gradiometer_monitor.settings import Settings
from gradiometer_monitor.web import api, page, rows, scrape, stream
from gradiometer_monitor.web.history import HistoryCache

__all__ = ["app"]

LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")


def app(context: Context, exposition: Exposition, settings: Settings) -> FastAPI:
    """Make the application that serves ``context.runs``."""
    made = FastAPI(
        title="gradiometer monitor",
        version=installed_version(),
        openapi_url="/api/v1/openapi.json",
        docs_url=None,  # its page loads scripts from the web
        redoc_url=None,
    )
    cache, streams = HistoryCache(), stream.Streams()
    made.state.streams = streams
    made.include_router(api.router(context))
    made.include_router(rows.router(context, cache))
    made.include_router(stream.router(context, cache, streams))
    made.routes.extend(scrape.routes(context, exposition, settings))
    made.routes.extend(page.routes())
    made.add_middleware(TrustedHostMiddleware, allowed_hosts=_allowed(settings.host), www_redirect=False)
    return made


def _allowed(host: str) -> list[str]:
    """Name the hosts, without port, that a request may ask for."""
    # Older Starlettes cut the port off at the first colon, and leave a bracket of any IPv6 address; no name has one.
    return [*LOCAL_HOSTS, f"[{host}]" if ":" in host else host, "["]
