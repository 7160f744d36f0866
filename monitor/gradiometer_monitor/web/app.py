"""The ASGI application: which paths there are, and what every request passes through.

Handlers that need the lock of the runs are plain functions, which run in a bounded pool of threads; the probes need
neither, so that they answer when everything else waits. A request passes, in this order: host, origin and sizes
(:class:`FrontGuard`), who asks and may (:class:`AuthMiddleware`), its body (:class:`BodyGuard`), time
(:class:`TimeGuard`).

Routes are the application's own, not those of a router that is included, which newer FastAPIs hide: each is asked what
it needs of a token, and one that does not say so ends the start.
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
from gradiometer_monitor.web.roles import Needs
from gradiometer_monitor.web.tokens import Tokens

__all__ = ["app"]


def app(context: Context, exposition: Exposition, settings: Settings, cache: HistoryCache | None = None) -> FastAPI:
    """Make the application that serves ``context.runs``. Raises SettingsError if its tokens cannot be read.

    ``cache`` of another's rows is taken over, so that a reload neither reads nor holds them twice.
    """
    tokens = None if settings.auth.tokens_file is None else Tokens(settings.auth.tokens_file)
    made = documented(settings.limits)
    cache, streams = cache or HistoryCache(), stream.Streams()
    made.state.streams = streams
    for routes in (
        api.router(context).routes,
        policy.router(context).routes,
        alerts.router(context, enabled=settings.alerts is not None).routes,
        rows.router(context, cache).routes,
        stream.router(context, cache, streams).routes,
        scrape.routes(context, exposition, settings),
        page.routes(),
        runbooks.routes(),
    ):
        made.routes.extend(routes)
    exposition.watch("store", partial(store_samples, context.store))
    handle_errors(made)
    made.add_middleware(TimeGuard, limits=settings.limits)
    made.add_middleware(BodyGuard, limits=settings.limits)
    made.add_middleware(AuthMiddleware, tokens=tokens, needs=Needs(made.routes))
    made.add_middleware(FrontGuard, settings=settings)
    made.add_middleware(CountRequests, counts=exposition.requests)  # last, so that it sees what the others refuse
    return made
