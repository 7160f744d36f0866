"""Live updates as server-sent events: ``/api/v1/stream``.

There is no queue for a client: a cursor says what it has been sent, and what came since is read from the ring and the
store when it is there to take more, so that a client never holds up anything and a reconnect that names its cursor goes
on where it was. One that takes nothing for SEND_SECONDS is dropped; there are at most MAX_STREAMS.
"""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from logging import getLogger
from typing import Annotated

from fastapi import APIRouter, Header, HTTPException, Response
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from gradiometer_monitor.services import Context
from gradiometer_monitor.web.api import describe
from gradiometer_monitor.web.history import HistoryCache, Selection
from gradiometer_monitor.web.lookup import RunIdQuery
from gradiometer_monitor.web.openapi import api_router
from gradiometer_monitor.web.roles import needs
from gradiometer_monitor.web.rows import Rank, answer, source_of
from gradiometer_monitor.web.schemas import EventOut, RunList

__all__ = ["Streams", "router"]

log = getLogger(__name__)

MAX_STREAMS = 32
"""Streams that are open at once; one more is told 503."""
TICK_SECONDS = 0.4
"""Pause between two looks for news."""
HEARTBEAT_SECONDS = 5.0
"""A comment is sent after so long without news, so that a client knows that the monitor is there."""
SEND_SECONDS = 20.0
"""A client that takes nothing for so long is dropped."""
STREAM_SECONDS = 900.0
"""A stream ends after this, so that who asks is looked at again; a client comes again with its cursor."""
RETRY_MILLISECONDS = 2000
ROW_POINTS = 500
"""Buckets of one ``rows`` event: of more rows than this it is a down-sampled one."""
MAX_EVENTS = 200
"""Events that one look takes; the next one takes those that follow."""
ROW_COLUMNS = ("grad_norm_preclip", "grad_norm_postclip", "coefficient", "loss", "learning_rate", "step_seconds")
CURSOR = re.compile(r"(\d{1,18})-(\d{1,20})-(\d{1,18})")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cursor:
    """What a client has been sent; as an event's id ``<event>-<start of the run>-<row>``."""

    event: int
    created_ns: int = 0
    """Start of the run whose rows are counted; another start begins at its first row."""
    sequence: int = 0

    def __str__(self) -> str:
        return f"{self.event}-{self.created_ns}-{self.sequence}"


def _parse(text: str | None) -> Cursor | None:
    """Read the id of an event; None for anything else, which is no error: the client begins with what comes next."""
    found = CURSOR.fullmatch(text or "")
    if found is None:
        return None
    event, created_ns, sequence = (int(part) for part in found.groups())
    return Cursor(event=event, created_ns=created_ns, sequence=sequence)


class Streams:
    """The streams that are open, and the end of them all."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open = 0
        self._closing, self._hung_up = threading.Event(), threading.Event()
        self._listed: tuple[float, str] = (0.0, "")

    def take(self) -> threading.Event:
        """Take one of the places, which :meth:`give` gives back; return what is set when the stream is to end.

        Raises HTTPException when there is none.
        """
        with self._lock:
            if self._open >= MAX_STREAMS:
                raise HTTPException(503, f"{MAX_STREAMS} streams are open, and no more are served: close one")
            self._open += 1
            return self._hung_up

    def give(self) -> None:
        with self._lock:
            self._open -= 1

    @property
    def open(self) -> int:
        return self._open

    def close(self) -> None:
        """End every stream at its next look; from any thread, when the server stops or begins to serve otherwise."""
        self._closing.set()

    def hang_up(self) -> None:
        """End the streams that are open, at their next look: clients come again, and are asked who they are."""
        ended, self._hung_up = self._hung_up, threading.Event()
        ended.set()

    @property
    def closing(self) -> bool:
        return self._closing.is_set()

    def runs(self, context: Context) -> str:
        """List the runs as JSON, once a tick for all clients."""
        with self._lock:
            made_at, text = self._listed
            if time.monotonic() - made_at >= TICK_SECONDS:
                with context.runs.snapshot() as found:
                    runs = [describe(run) for run in found]
                listed = RunList(runs=runs, total=len(runs), unreadable=context.runs.unreadable())
                text = listed.model_dump_json()
                self._listed = time.monotonic(), text
            return text


def router(context: Context, cache: HistoryCache, streams: Streams) -> APIRouter:
    """Make the route of the stream."""
    made = api_router()

    @made.get("/stream", tags=["runs"], response_class=Response, responses=RESPONSES)
    @needs("read")
    def stream(
        run_id: RunIdQuery = None,
        rank: Rank = 0,
        last_event_id: Annotated[str | None, Header(max_length=64, description="Id of the last event got.")] = None,
    ) -> Response:
        """Stream what happens, as server-sent events.

        ``runs`` is the answer of ``/api/v1/runs``, when it changed; ``event`` one event, of ``run_id`` or of all; with
        ``run_id`` there is ``rows``, an answer of its rows route with the rows that came since. With Last-Event-ID a
        client goes on where it was.
        """
        return _EventStream(_Client(context, cache, streams, run_id, rank, _parse(last_event_id)), streams)

    return made


RESPONSES: dict[int | str, dict[str, object]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}},
    503: {"description": "Too many streams are open."},
}


class _Client:
    """One client: its cursor, and what is new to it."""

    def __init__(
        self, context: Context, cache: HistoryCache, streams: Streams, run_id: str | None, rank: int, at: Cursor | None
    ) -> None:
        self._context, self._cache, self._streams, self._run_id, self._rank = context, cache, streams, run_id, rank
        self._runs = ""
        newest = context.store.events(run_id=run_id, limit=1)
        self._cursor = at or Cursor(event=newest[-1].number if newest else 0)
        if run_id is not None:
            source = source_of(context, run_id, rank)
            if at is None:
                head = cache.select(source, "grad_norm_preclip", Selection(points=1)).head
                self._cursor = replace(self._cursor, created_ns=source.manifest.created_ns, sequence=head)

    def news(self) -> list[str]:
        """Look for what is new, and frame it; in a thread, for it reads files."""
        found = []
        if (runs := self._streams.runs(self._context)) != self._runs:
            self._runs = runs
            found.append(self._frame("runs", runs))
        found += self._events()
        if self._run_id is not None:
            found += self._rows(self._run_id)
        return found

    def _events(self) -> Iterator[str]:
        for event in self._context.store.events(run_id=self._run_id, after=self._cursor.event, limit=MAX_EVENTS):
            self._cursor = replace(self._cursor, event=event.number)
            yield self._frame("event", EventOut.model_validate(event, from_attributes=True).model_dump_json())

    def _rows(self, run_id: str) -> Iterator[str]:
        try:
            source = source_of(self._context, run_id, self._rank)
        except HTTPException:
            return  # it is over and has left, as the list of runs says
        created_ns = source.manifest.created_ns
        after = self._cursor.sequence if self._cursor.created_ns == created_ns else 0
        selection = Selection(after_sequence=after, points=ROW_POINTS)
        try:
            rows = answer(self._cache, source, "grad_norm_preclip", selection, ROW_COLUMNS, [])
        except HTTPException:
            return  # not readable at the moment; the run is listed as such
        if rows.steps:
            self._cursor = replace(self._cursor, created_ns=created_ns, sequence=rows.last_sequence)
            yield self._frame("rows", rows.model_dump_json())

    def _frame(self, kind: str, data: str) -> str:
        return f"event: {kind}\nid: {self._cursor}\ndata: {data}\n\n"


class _EventStream(Response):
    """A response that lasts until the client goes, takes nothing any more, or the server stops."""

    media_type = "text/event-stream"

    def __init__(self, client: _Client, streams: Streams) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._client, self._streams = client, streams
        self._hung_up = streams.take()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await self._last(_sender(send), gone)
            if not gone.done():
                await send({"type": "http.response.body", "body": b""})
        except TimeoutError:
            log.warning("a client of the stream took nothing for %g s and is dropped", SEND_SECONDS)
        finally:
            gone.cancel()
            self._streams.give()

    @property
    def _ends(self) -> bool:
        return self._hung_up.is_set() or self._streams.closing

    async def _last(self, tell: Callable[[str], Awaitable[None]], gone: asyncio.Future[None]) -> None:
        await tell(f"retry: {RETRY_MILLISECONDS}\n\n")
        begun_at = told_at = time.monotonic()
        while not gone.done() and not self._ends and time.monotonic() - begun_at < STREAM_SECONDS:
            found = await run_in_threadpool(self._client.news)
            if not found and time.monotonic() - told_at >= HEARTBEAT_SECONDS:
                found = [": still here\n\n"]
            if found:
                await tell("".join(found))
                told_at = time.monotonic()
            await asyncio.sleep(TICK_SECONDS)


def _sender(send: Send) -> Callable[[str], Awaitable[None]]:
    async def tell(text: str) -> None:
        message = {"type": "http.response.body", "body": text.encode(), "more_body": True}
        await asyncio.wait_for(send(message), SEND_SECONDS)

    return tell


async def _gone(receive: Receive) -> None:
    """Wait until the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
