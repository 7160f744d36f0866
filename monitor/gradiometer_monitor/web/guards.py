"""What every request passes before and after it is known who asks: host, origin, sizes, time, and headers of answers.

Guarantees: a page of the web can neither read from the monitor nor write through it; a handler sees whole, bounded
bodies of JSON only; a slow handler is given up and leaves threads to the scrape.
"""

from __future__ import annotations

import asyncio
import re
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gradiometer_monitor.config.settings import Settings
from gradiometer_monitor.web.settings import LimitSettings

__all__ = ["BodyGuard", "FrontGuard", "TimeGuard"]

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})
ANY_ADDRESS = ("0.0.0.0", "::")  # noqa: S104 - asked for, not bound
CONCURRENT = 16
"""Requests to the API that are worked on at once, so that threads are left for the scrape; others wait."""
STREAM = "/api/v1/stream"
"""Answers for as long as the client listens: its own limits are those of :mod:`gradiometer_monitor.web.stream`."""
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "content-security-policy": (
        "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "cache-control": "no-store",
}
"""Of every answer, unless its handler says something else."""
JSON_TYPE = re.compile(r"application/(?:[a-z0-9.+-]+\+)?json(?:\s*;.*)?", re.IGNORECASE)


class FrontGuard:
    """Refuses what is not meant for this monitor or too long, and puts :data:`HEADERS` on every answer."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._limits = app, settings.limits
        host = settings.host.lower()
        self._hosts = {*LOCAL_HOSTS, f"[{host}]" if ":" in host else host}
        self._suffixes = tuple(name[1:].lower() for name in settings.auth.allowed_hosts if name.startswith("*."))
        self._hosts |= {name.lower() for name in settings.auth.allowed_hosts}
        self._any_address = host in ANY_ADDRESS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refused = self._refuse(scope)
        await (self._app if refused is None else refused)(scope, receive, secured)

    def _refuse(self, scope: Scope) -> JSONResponse | None:
        limits, headers = self._limits, Headers(scope=scope)
        if not self._is_ours(headers.get("host", "")):
            return _refusal(400, "the Host of the request is not this monitor's: ask by the name or address that it "
                            "serves, or name others in auth.allowed_hosts")  # fmt: skip
        if scope["method"] not in SAFE_METHODS and not _same_origin(headers):
            return _refusal(403, "a page of another origin asks: changes are made by this monitor's own page, or by "
                            "programs, which send no Origin")  # fmt: skip
        if sum(len(name) + len(value) + 4 for name, value in scope["headers"]) > limits.max_header_bytes:
            return _refusal(431, f"the headers are longer than {limits.max_header_bytes} bytes")
        if len(scope["query_string"]) > limits.max_query_bytes:
            return _refusal(414, f"the query is longer than {limits.max_query_bytes} bytes")
        return None

    def _is_ours(self, host: str) -> bool:
        name = re.sub(r":\d*$", "", host).lower()
        return (
            name in self._hosts
            or name.endswith(self._suffixes or ("\0",))
            or (self._any_address and _is_address(name))  # no name that somebody else lets resolve to this host
        )


class BodyGuard:
    """Reads bodies before a handler is called, so that what is too long, or no JSON, is refused without it."""

    def __init__(self, app: ASGIApp, limits: LimitSettings) -> None:
        self._app, self._limit = app, limits.max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        if "content-length" not in headers and "transfer-encoding" not in headers:
            await self._app(scope, receive, send)
            return
        body = await self._read(headers, receive)
        if body is None:
            await _refusal(413, f"the body is longer than {self._limit} bytes")(scope, receive, send)
        elif body and scope["method"] not in SAFE_METHODS and not JSON_TYPE.fullmatch(headers.get("content-type", "")):
            detail = "expected 'Content-Type: application/json', because nothing else is understood"
            await _refusal(415, detail)(scope, receive, send)
        else:
            await self._app(scope, _replay(body, receive), send)

    async def _read(self, headers: Headers, receive: Receive) -> bytes | None:
        """Return the body, None if it is too long; as far as it came, if the client has gone."""
        length, body = headers.get("content-length", "0"), bytearray()
        if int(length) > self._limit:  # a number, or h11 would have refused it
            return None
        while True:
            message = await receive()
            body += message.get("body", b"")
            if len(body) > self._limit:
                return None
            if not message.get("more_body"):
                return bytes(body)


class TimeGuard:
    """Gives up answers of the API that do not begin in time, with 504, and bounds how many are worked on at once.

    The thread of a handler that was given up goes on to its end, and holds its place until then.
    """

    def __init__(self, app: ASGIApp, limits: LimitSettings) -> None:
        self._app, self._seconds = app, limits.answer_seconds
        self._places = asyncio.Semaphore(CONCURRENT)
        self._abandoned: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/api/") or scope["path"] == STREAM:
            await self._app(scope, receive, send)
            return
        begun, given_up = asyncio.Event(), False

        async def forward(message: Message) -> None:
            begun.set()
            if not given_up:
                await send(message)

        async def work() -> None:
            async with self._places:
                if not given_up:
                    await self._app(scope, receive, forward)

        task, start = asyncio.create_task(work()), asyncio.create_task(begun.wait())
        await asyncio.wait({task, start}, timeout=self._seconds, return_when=asyncio.FIRST_COMPLETED)
        start.cancel()
        if begun.is_set() or task.done():
            await task
            return
        given_up = True
        self._abandoned.add(task)
        task.add_done_callback(self._forget)
        await _refusal(504, f"no answer within {self._seconds:g} s: ask for less, or try again")(scope, receive, send)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._abandoned.discard(task)
        task.cancelled() or task.exception()  # which nobody waits for any more


def _refusal(status: int, detail: str) -> JSONResponse:
    return JSONResponse({"detail": detail}, status_code=status)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Give a body that was read already, and after it what comes then."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _same_origin(headers: Headers) -> bool:
    """Tell whether no page asks, or one of this monitor's own."""
    if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        return False
    origin = headers.get("origin")
    try:
        return origin is None or urlsplit(origin).netloc.lower() == headers.get("host", "").lower()
    except ValueError:  # no origin at all, such as half an address
        return False


def _is_address(name: str) -> bool:
    try:
        ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True
