"""The page at ``/``."""

from __future__ import annotations

import html
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import BaseRoute, Route

from gradiometer_monitor.services import Context
from gradiometer_monitor.web.api import describe
from gradiometer_monitor.web.schemas import RunSummary

__all__ = ["routes"]


def routes(context: Context) -> list[BaseRoute]:
    """Make the routes of the page."""

    def index(_: Request) -> Response:
        with context.runs.snapshot() as found:
            described = [describe(run) for run in found]
        return HTMLResponse(_index(described))

    return [Route("/", index)]


def _index(described: list[RunSummary]) -> str:
    columns = ("run_id", "state", "last_step", "grad_norm", "grad_norm_baseline", "loss", "nonfinite_steps")
    head = "".join(f"<th>{column.replace('_', ' ')}</th>" for column in columns)
    rows = "".join(f"<tr>{''.join(_cell(getattr(run, column)) for column in columns)}</tr>\n" for run in described)
    return (
        "<!doctype html>\n<html lang=en><meta charset=utf-8><title>gradiometer</title>\n<h1>gradiometer</h1>\n"
        f"<table border=1>\n<tr>{head}</tr>\n{rows}</table>\n"
        f"<p>{'' if described else 'No runs yet. '}"
        '<a href="/metrics">metrics</a>, <a href="/api/v1/runs">runs as JSON</a>, <a href="/-/ready">ready</a></p>\n'
    )


def _cell(value: Any) -> str:
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return f"<td>{html.escape(text)}</td>"
