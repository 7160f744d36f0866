"""How connections are served: uvicorn's HTTP/1.1, with the limits that it does not have.

Guarantees: a request that does not arrive in time, or whose headers are too long, is answered and closed, or just
closed; an answer that is not taken in time is cut off.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from functools import partial
from http import HTTPStatus
from typing import Any, ClassVar, cast

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from gradiometer_monitor.config.settings import Settings
from gradiometer_monitor.server import GRACE_SECONDS
from gradiometer_monitor.web.listen import Gate, Listener
from gradiometer_monitor.web.tls import Certificate

__all__ = ["Connection", "server_config"]

KEEP_ALIVE_SECONDS = 75
"""An idle connection is kept for this long, so that who scrapes once a minute need not connect each time."""
MAX_UNSENT_BYTES = 256 * 2**20
"""Answers that clients have not taken yet, of all connections together; beyond, the one that holds most is cut."""


class Connection(H11Protocol):
    """One connection. Waits for its client: before a request, until it is there whole, and while an answer is not
    taken."""

    unsent: ClassVar[set[Connection]] = set()
    """Those whose clients take their answers slowly."""

    def __init__(self, *args: Any, gate: Gate, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._gate, self._limits = gate, gate.limits
        self.conn = h11.Connection(h11.SERVER, self._limits.max_header_bytes)
        self._waits_since: float = time.monotonic()
        self._arrival: asyncio.TimerHandle | None = None
        self._departure: asyncio.TimerHandle | None = None

    @property
    def idle_since(self) -> float | None:
        """When (monotonic) the connection began to wait for its client; None while it is being served.

        One whose client has sent more requests than it has taken answers of is not: it could keep others out for long.
        """
        heaped = bool(self.conn.trailing_data[0])
        return None if self._serving and not self.flow.write_paused and not heaped else self._waits_since

    @property
    def _serving(self) -> bool:
        """Whether a request is there whole, and its answer is not."""
        return self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body

    def cut(self) -> None:
        """Close at once."""
        self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._gate.guard(transport.get_extra_info("socket").fileno(), self)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self.unsent.discard(self)
        for timer in (self._arrival, self._departure):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        self._waits_since = time.monotonic()
        super().on_response_complete()
        self._watch()

    def _watch(self) -> None:
        """Have a request that has begun to arrive be there in time."""
        state, closing = self.conn.their_state, self.transport.is_closing()
        begun = self.cycle is None or bool(self.conn.trailing_data[0])
        if not closing and (state is h11.SEND_BODY or (state is h11.IDLE and begun)):
            if self._arrival is None:
                self._waits_since = time.monotonic()
                self._arrival = self.loop.call_later(self._limits.request_seconds, self._late)
        elif self._arrival is not None:
            self._arrival.cancel()
            self._arrival = None

    def _late(self) -> None:
        self._arrival = None
        if self.transport.is_closing():
            return
        begun = self.conn.their_state is h11.SEND_BODY or bool(self.conn.trailing_data[0])
        if begun:
            self._end(408, f"the request did not arrive within {self._limits.request_seconds:g} s")
        else:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no request, with the status that h11 finds right for the error that is being handled."""
        error = sys.exc_info()[1]
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        if status == 431:
            msg = f"the headers are longer than {self._limits.max_header_bytes} bytes"
        self._end(status, msg)

    def _end(self, status: int, detail: str) -> None:
        """Answer and close; just close where an answer has begun."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps({"detail": detail}).encode()
            headers = [
                ("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close"),
                ("cache-control", "no-store"), ("x-content-type-options", "nosniff"),
            ]  # fmt: skip
            reason = HTTPStatus(status).phrase.encode()
            for event in (
                h11.Response(status_code=status, headers=headers, reason=reason),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def pause_writing(self) -> None:
        """The client takes less than there is to send: it has a while to take it, and there is a bound for all."""
        super().pause_writing()
        self._waits_since = time.monotonic()
        self._departure = self.loop.call_later(self._limits.answer_seconds, self.transport.abort)
        self.unsent.add(self)
        sizes = {each: each.transport.get_write_buffer_size() for each in self.unsent}
        if sum(sizes.values()) > MAX_UNSENT_BYTES:
            max(sizes, key=sizes.__getitem__).cut()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.unsent.discard(self)
        if self._departure is not None:
            self._departure.cancel()
            self._departure = None


def server_config(asgi: ASGIApp, settings: Settings, listener: Listener) -> uvicorn.Config:
    """Configure uvicorn to serve ``asgi`` to the connections of ``listener``. Raises SettingsError for TLS files."""
    auth, made = settings.auth, partial(Connection, gate=listener.gate)
    config = uvicorn.Config(
        asgi,
        http=cast("type[asyncio.Protocol]", made),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # whoever is on this host could say to be any client
        lifespan="off",
        ws="none",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    if auth.tls_certificate is not None and auth.tls_key is not None:
        certificate = Certificate(auth.tls_certificate, auth.tls_key)
        config.load()
        config.ssl = certificate.context
        listener.before = certificate.refresh
    return config
