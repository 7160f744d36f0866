"""The monitor's HTTP interface: /metrics, /-/healthy, /-/ready, /api/v1/runs, and an index of runs at /.

Everything is read-only. Handlers that need the lock of the runs are plain functions, which Starlette runs in its
bounded pool of threads; the probes need neither, so that they answer when everything else waits. A request whose Host
is not this host's is refused: a page of the web could otherwise read the metrics, by a name that resolves to loopback.
"""

from __future__ import annotations

import gzip
import html
import math
import time
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from gradiometer_monitor.exposition import Exposition, negotiate
from gradiometer_monitor.runs import Run, Runs

__all__ = ["app"]

GZIP_LEVEL = 1
"""Level 6 makes a scrape of many layers cost eight times its rendering, for little less to send."""


LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
HEALTHY_SECONDS, HEALTHY_POLLS = 30.0, 10
"""A poll that is not done after the first, or after as many pauses between polls, is stuck."""


def app(runs: Runs, exposition: Exposition, *, host: str, poll_seconds: float) -> Starlette:
    """Make the ASGI application that serves ``runs`` on ``host``, polled every ``poll_seconds``."""
    limit = max(HEALTHY_SECONDS, HEALTHY_POLLS * poll_seconds)

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

    def list_runs(_: Request) -> Response:
        return JSONResponse({"runs": _describe_all(runs), "unreadable": runs.unreadable()})

    def index(_: Request) -> Response:
        return HTMLResponse(_index(_describe_all(runs)))

    handlers = {"/metrics": metrics, "/-/healthy": healthy, "/-/ready": ready, "/api/v1/runs": list_runs, "/": index}
    return Starlette(
        routes=[Route(path, handler) for path, handler in handlers.items()],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=_allowed(host), www_redirect=False)],
    )


def _allowed(host: str) -> list[str]:
    """Name the hosts, without port, that a request may ask for."""
    # Older Starlettes cut the port off at the first colon, and leave a bracket of any IPv6 address; no name has one.
    return [*LOCAL_HOSTS, f"[{host}]" if ":" in host else host, "["]


def _accepts_gzip(accept_encoding: str) -> bool:
    for item in accept_encoding.lower().split(","):
        coding, _, quality = item.replace(" ", "").partition(";q=")
        if coding == "gzip":
            return quality.strip("0.") != "" or quality == ""
    return False


def _describe_all(runs: Runs) -> list[dict[str, Any]]:
    with runs.snapshot() as found:
        return [_describe(run) for run in found]


def _describe(run: Run) -> dict[str, Any]:
    """Describe a run as JSON can: a number that is not known, or not finite, is null."""
    summary = run.ranks[0].summary
    row, status = summary.newest, summary.status
    described = {
        "run_id": run.run_id,
        "state": run.state,
        "ranks": [tail.rank for tail in run.ranks],
        "steps": int(status["steps"]),
        "last_step": None if row is None else int(row["step"]),
        "last_step_timestamp_seconds": None if row is None else int(row["time_ns"]) / 1e9,
        "grad_norm": None if row is None else float(row["grad_norm_preclip"]),
        "grad_norm_baseline": summary.grad_norm_baseline,
        "loss": summary.loss,
        "clip_events": int(run.ranks[0].clip_events.sum()),
        "nonfinite_steps": int(status["nonfinite_steps"]),
        "skipped_steps": int(status["skipped_steps"]),
    }
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in described.items()}


def _index(described: list[dict[str, Any]]) -> str:
    columns = ("run_id", "state", "last_step", "grad_norm", "grad_norm_baseline", "loss", "nonfinite_steps")
    head = "".join(f"<th>{column.replace('_', ' ')}</th>" for column in columns)
    rows = "".join(f"<tr>{''.join(_cell(run[column]) for column in columns)}</tr>\n" for run in described)
    return (
        "<!doctype html>\n<html lang=en><meta charset=utf-8><title>gradiometer</title>\n<h1>gradiometer</h1>\n"
        f"<table border=1>\n<tr>{head}</tr>\n{rows}</table>\n"
        f"<p>{'' if described else 'No runs yet. '}"
        '<a href="/metrics">metrics</a>, <a href="/api/v1/runs">runs as JSON</a>, <a href="/-/ready">ready</a></p>\n'
    )


def _cell(value: Any) -> str:
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return f"<td>{html.escape(text)}</td>"
