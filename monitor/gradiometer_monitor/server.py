"""The HTTP server: uvicorn, with an application that a reload replaces, and an end that does not wait for anyone."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["GRACE_SECONDS", "Server", "Switch"]

GRACE_SECONDS = 3
"""How long requests may take to end once the monitor is told to; a stream or a slow client is then cut off."""


class Switch:
    """Passes each request to the application of the moment; those under way stay with the one that they began with."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


class Server(uvicorn.Server):
    """Serves until the first SIGTERM or SIGINT, and ends the process at once at the second."""

    def __init__(self, config: uvicorn.Config, *, serving: Callable[[], None], stopping: Callable[[], None]) -> None:
        super().__init__(config)
        self._serving, self._stopping = serving, stopping
        self.ticked_at = time.monotonic()
        """When the event loop last had its turn."""
        self.ended_by = ""
        """Name of the signal that ends it, once there is one."""

    def take_signals(self) -> None:
        """Receive the signals that end the server; for the main thread, before :meth:`run`."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle_exit)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End in order, or at once when told so again. Nothing is noted, so uvicorn raises no signal once more."""
        del frame
        if self.should_exit:
            os._exit(128 + sig)
        self.ended_by = signal.Signals(sig).name
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._serving()

    async def on_tick(self, counter: int) -> bool:
        self.ticked_at = time.monotonic()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        logging.getLogger("uvicorn.error").addFilter(_expected_at_the_end)
        self._stopping()
        await super().shutdown(sockets)


def _expected_at_the_end(record: logging.LogRecord) -> bool:
    """Tell whether a record is worth logging at the end: not that requests were cut off, which is what was wanted."""
    cancelled = record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError)
    return not cancelled and not str(record.msg).startswith("Cancel %s running task")
