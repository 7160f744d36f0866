"""What Prometheus and whoever watches over the monitor ask for: ``/metrics`` and the probes."""

from __future__ import annotations

import gzip
import time

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from gradiometer_monitor.exposition import Exposition, negotiate
from gradiometer_monitor.services import Context
from gradiometer_monitor.settings import Settings

__all__ = ["routes"]

GZIP_LEVEL = 1
"""Level 6 makes a scrape of many layers cost eight times its rendering, for little less to send."""
HEALTHY_SECONDS, HEALTHY_POLLS = 30.0, 10
"""A poll that is not done after the first, or after as many pauses between polls, is stuck."""


def routes(context: Context, exposition: Exposition, settings: Settings) -> list[BaseRoute]:
    """Make the routes of the metrics and the probes."""
    runs, limit = context.runs, max(HEALTHY_SECONDS, HEALTHY_POLLS * settings.poll_seconds)

    def metrics(request: Request) -> Response:
        content_type = negotiate(request.headers.get("accept", ""))
        body = exposition.render(content_type)
        headers = {"content-type": content_type, "vary": "accept, accept-encoding"}
        if _accepts_gzip(request.headers.get("accept-encoding", "")):
            body = gzip.compress(body, GZIP_LEVEL)
            headers["content-encoding"] = "gzip"
        return Response(body, headers=headers)

    async def healthy(_: Request) -> Response:
        silent = time.monotonic() - runs.polled_at
        if silent <= limit:
            return PlainTextResponse("healthy\n")
        return PlainTextResponse(f"no poll was done for {silent:.0f} s\n", status_code=503)

    async def ready(_: Request) -> Response:
        if runs.ready.is_set():
            return PlainTextResponse("ready\n")
        return PlainTextResponse("the run directories have not been read to their end yet\n", status_code=503)

    return [Route("/metrics", metrics), Route("/-/healthy", healthy), Route("/-/ready", ready)]


def _accepts_gzip(accept_encoding: str) -> bool:
    for item in accept_encoding.lower().split(","):
        coding, _, quality = item.replace(" ", "").partition(";q=")
        if coding == "gzip":
            return quality.strip("0.") != "" or quality == ""
    return False
