"""The live page at ``/`` and the files it is made of, which are told to load nothing from elsewhere."""

from __future__ import annotations

import hashlib
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from gradiometer_monitor.web.roles import needs

__all__ = ["routes"]

MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
HEADERS = {
    "content-security-policy": (
        "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}
"""No script, style or request but from this server, and none that is written into a document."""


def routes() -> list[BaseRoute]:
    """Read the files of the page, and make a route for each: a path is never made from a request's."""
    found = (file for file in files("gradiometer_monitor.web").joinpath("static").iterdir())
    made: list[BaseRoute] = []
    for file in found:
        suffix = file.name[file.name.rfind(".") :]
        if suffix in MEDIA_TYPES:
            path = "/" if file.name == "index.html" else f"/static/{file.name}"
            made.append(_route(path, file.read_bytes(), MEDIA_TYPES[suffix]))
    return made


def _route(path: str, content: bytes, media_type: str) -> Route:
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'

    @needs("nothing")  # the same file from every monitor
    async def serve(request: Request) -> Response:
        headers = {**HEADERS, "etag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=media_type, headers=headers)

    return Route(path, serve)
