"""What is answered when no handler answers: as JSON, like everything else of the API."""

from __future__ import annotations

import json
import sqlite3
from logging import getLogger

from fastapi import FastAPI
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match

from gradiometer_monitor.web.guards import HEADERS

__all__ = ["handle_errors"]

log = getLogger(__name__)

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")


def handle_errors(app: FastAPI) -> None:
    """Answer methods that a path has not, requests that are not understood, and handlers that fail."""

    def not_allowed(request: Request, _: Exception) -> Response:
        """Name all methods of the path: each of its routes knows but its own."""
        asked = [{**request.scope, "method": method} for method in METHODS]
        allowed = [
            scope["method"] for scope in asked if any(each.matches(scope)[0] is Match.FULL for each in app.routes)
        ]
        headers = {"allow": ", ".join(allowed)}
        return JSONResponse({"detail": "Method Not Allowed"}, status_code=405, headers=headers)

    def failed(_: Request, __: Exception) -> Response:
        """Tell nothing of what went wrong, which is in the log."""
        return JSONResponse(
            {"detail": "the monitor failed to answer: its log says why"}, status_code=500, headers=HEADERS
        )

    def not_understood(_: Request, error: Exception) -> Response:
        """Name what is wrong, and repeat it as any JSON can: null for what is not finite, '?' for half a surrogate."""
        problems = jsonable_encoder(error.errors()) if isinstance(error, RequestValidationError) else []
        problems = json.loads(json.dumps(problems), parse_constant=lambda _: None)
        body = json.dumps({"detail": problems}, ensure_ascii=False).encode("utf-8", "replace")
        return Response(body, 422, media_type="application/json")

    def not_stored(request: Request, error: Exception) -> Response:
        """Say that the file of events and notes is damaged, full or locked, and not this request's fault."""
        log.warning("%s cannot be answered from the store: %s", request.url.path, error)
        detail = "what the monitor remembers cannot be read or written just now: its log says why, try again"
        return JSONResponse({"detail": detail}, status_code=503)

    app.add_exception_handler(sqlite3.Error, not_stored)
    app.add_exception_handler(RequestValidationError, not_understood)
    app.add_exception_handler(405, not_allowed)
    app.add_exception_handler(Exception, failed)
