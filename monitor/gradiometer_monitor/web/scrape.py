"""What Prometheus and whoever watches over the monitor ask for: ``/metrics`` and the probes."""

from __future__ import annotations

import time

import cramjam
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from gradiometer_monitor.config.settings import Settings
from gradiometer_monitor.exposition.exposition import Exposition
from gradiometer_monitor.services import Context
from gradiometer_monitor.web.accept import accepts_gzip, negotiate
from gradiometer_monitor.web.roles import needs

__all__ = ["poll_limit", "routes"]

GZIP_LEVEL = 1
"""Level 6 makes a scrape of many layers cost eight times its rendering, for little less to send. At level 1
cramjam takes half the time of zlib."""
HEALTHY_SECONDS, HEALTHY_POLLS = 30.0, 10
"""A poll that is not done after the first, or after as many pauses between polls, is stuck."""


def poll_limit(settings: Settings) -> float:
    """Return after how many seconds without a poll the monitor is not healthy."""
    return max(HEALTHY_SECONDS, HEALTHY_POLLS * settings.poll_seconds)


def routes(context: Context, exposition: Exposition, settings: Settings) -> list[BaseRoute]:
    """Make the routes of the metrics and the probes."""
    runs, limit = context.runs, poll_limit(settings)

    @needs("metrics")
    def metrics(request: Request) -> Response:
        content_type = negotiate(_header(request, "accept"))
        body = exposition.render(content_type)
        headers = {"content-type": content_type, "vary": "accept, accept-encoding"}
        if accepts_gzip(_header(request, "accept-encoding")):
            body = bytes(cramjam.gzip.compress(body, level=GZIP_LEVEL))
            headers["content-encoding"] = "gzip"
        return Response(body, headers=headers)

    @needs("nothing")
    async def healthy(_: Request) -> Response:
        silent = time.monotonic() - runs.polled_at
        if silent <= limit:
            return PlainTextResponse("healthy\n")
        return PlainTextResponse(f"no poll was done for {silent:.0f} s\n", status_code=503)

    @needs("nothing")
    async def ready(_: Request) -> Response:
        if runs.ready.is_set():
            return PlainTextResponse("ready\n")
        return PlainTextResponse("the run directories have not been read to their end yet\n", status_code=503)

    return [Route("/metrics", metrics), Route("/-/healthy", healthy), Route("/-/ready", ready)]


def _header(request: Request, name: str) -> str:
    """Return a header that may come several times as one."""
    return ",".join(request.headers.getlist(name))
