"""The ASGI application: which paths there are, and what every request passes through.

Handlers that need the lock of the runs are plain functions, which run in a bounded pool of threads; the probes need
neither, so that they answer when everything else waits. A request passes, in this order: host, origin and sizes
(:class:`FrontGuard`), who asks (:class:`AuthMiddleware`), its body (:class:`BodyGuard`), time (:class:`TimeGuard`).
"""

from __future__ import annotations

from functools import partial

from fastapi import FastAPI

from gradiometer_monitor.config.settings import Settings
from gradiometer_monitor.exposition.exposition import Exposition
from gradiometer_monitor.exposition.health import store_samples
from gradiometer_monitor.services import Context
from gradiometer_monitor.web import alerts, api, page, policy, rows, runbooks, scrape, stream
from gradiometer_monitor.web.auth import AuthMiddleware
from gradiometer_monitor.web.errors import handle_errors
from gradiometer_monitor.web.guards import BodyGuard, FrontGuard, TimeGuard
from gradiometer_monitor.web.history import HistoryCache
from gradiometer_monitor.web.openapi import documented
from gradiometer_monitor.web.requests import CountRequests
from gradiometer_monitor.web.tokens import Tokens

__all__ = ["app"]


def app(context: Context, exposition: Exposition, settings: Settings, cache: HistoryCache | None = None) -> FastAPI:
    """Make the application that serves ``context.runs``. Raises SettingsError if its tokens cannot be read.

    ``cache`` of another's rows is taken over, so that a reload neither reads nor holds them twice.
    """
    tokens = None if settings.auth.tokens_file is None else Tokens(settings.auth.tokens_file)
    made = documented(settings.limits)
    made.include_router(api.router(context))
    made.include_router(policy.router(context))
    made.include_router(alerts.router(context, enabled=settings.alerts is not None))
    cache, streams = cache or HistoryCache(), stream.Streams()
    made.state.streams = streams
    made.include_router(rows.router(context, cache))
    made.include_router(stream.router(context, cache, streams))
    made.routes.extend(scrape.routes(context, exposition, settings))
    made.routes.extend(page.routes())
    made.routes.extend(runbooks.routes())
    exposition.watch("store", partial(store_samples, context.store))
    handle_errors(made)
    made.add_middleware(TimeGuard, limits=settings.limits)
    made.add_middleware(BodyGuard, limits=settings.limits)
    made.add_middleware(AuthMiddleware, tokens=tokens)
    made.add_middleware(FrontGuard, settings=settings)
    made.add_middleware(CountRequests, counts=exposition.requests)  # last, so that it sees what the others refuse
    return made
