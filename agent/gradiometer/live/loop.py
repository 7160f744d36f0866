"""What the training loop sees of requests: it asks, or has given functions that are called; and what it answers.

Guarantees: a request shows in the middle of the step that the ranks agreed on, and so, to code between two steps, on
all ranks after the same one; it is never taken back, however long the loop leaves it. Telemetry: what is told of it
raises nothing. A function of the loop's that fails costs the request and not the training.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gradiometer.live.requests import KINDS, Kind, LoopRequest
from gradiometer.telemetry import Telemetry

__all__ = ["Handler", "Loop", "StopTraining", "check_handlers"]

logger = logging.getLogger(__name__)

UNANSWERED_SECONDS = 600.0
"""After which it is told, once, that the loop has not said what became of a request; it may still do it."""
MAX_NOTE = 1024
"""Characters of what the loop says of a request."""
Handler = Callable[[LoopRequest], object] | Literal["raise"]


class StopTraining(Exception):  # noqa: N818  # no error: what the loop has asked for, as StopIteration is
    """The job was asked to stop, and its loop has asked for this exception by ``on_request={"stop": "raise"}``."""


def check_handlers(handlers: Mapping[str, Handler] | None) -> dict[str, Handler]:
    """Return the handlers by kind; raises ValueError for a kind that does not exist, TypeError for no function."""
    found = dict(handlers or {})
    for kind, handler in found.items():
        if kind not in KINDS:
            raise ValueError(f"on_request has {kind!r}, expected functions for {' or '.join(map(repr, KINDS))}")
        if not callable(handler) and (kind, handler) != ("stop", "raise"):
            raise TypeError(
                f"on_request[{kind!r}] is {handler!r}, expected a function of one argument, the request"
                + (", or 'raise'" if kind == "stop" else "")
            )
    return found


@dataclass(kw_only=True, slots=True)
class _Delivered:
    request: LoopRequest
    at: float
    """When it was delivered, monotonic."""
    seen: bool = False
    """Whether the loop has been told."""
    answered: bool = False
    late: bool = False
    """Whether it was told that there is no answer."""


class Loop:
    """The requests to one agent's loop. Methods are for the training thread unless they say otherwise."""

    def __init__(self, telemetry: Telemetry, handlers: Mapping[str, Handler], next_step: Callable[[], int]) -> None:
        self.calls = False
        """Whether a function is to be called after the step: all that a step looks at."""
        self._telemetry, self._handlers, self._next_step = telemetry, dict(handlers), next_step
        self._polled: set[str] = set()
        self._delivered: dict[str, _Delivered] = {}
        """The newest of each kind."""
        self._lock = threading.RLock()

    def requested(self, kind: Kind) -> LoopRequest | None:
        """Return what was asked: a checkpoint once, a stop from then on. Raises ValueError for another kind."""
        found = self._delivered.get(kind)
        if kind not in self._polled:
            if kind not in KINDS:
                raise ValueError(f"agent.requested({kind!r}): expected {' or '.join(map(repr, KINDS))}")
            self._polled.add(kind)
        if found is None or kind in self._handlers or (found.seen and kind != "stop"):
            return None
        found.seen = True
        return found.request

    def done(self, kind: Kind, note: str = "") -> None:
        """Tell that what was asked is done; nothing if nothing was, so that every rank may say so."""
        found = self._delivered.get(kind)
        if found is not None and found.seen and not found.answered:
            seconds = time.monotonic() - found.at
            said = f": {note}" if note else ""
            self._answer(found, "request_done", f"done {seconds:.1f} s after it was asked{said}", note=note[:MAX_NOTE])

    def deliver(self, request: LoopRequest) -> None:
        """Let the loop see a request, in the middle of the step before which it was agreed on."""
        with self._lock:
            before = self._delivered.get(request.kind)
            if before is not None and self.heeds(request.kind):
                self._give_up(before, "the next one came")
            self._delivered[request.kind] = _Delivered(request=request, at=time.monotonic())
        if request.kind in self._handlers:
            self.calls = True
        if self.heeds(request.kind):
            self._tell("request_taken", request, f"asked of the loop after step {self._next_step()}", self._next_step())

    def call(self) -> None:
        """Call the functions for what was delivered; StopTraining and what is no Exception pass through."""
        self.calls = False
        for kind, handler in self._handlers.items():
            found = self._delivered.get(kind)
            if found is not None and not found.seen:
                found.seen = True
                self._call(found, handler)

    def _call(self, found: _Delivered, handler: Handler) -> None:
        kind = found.request.kind
        if not callable(handler):
            raise StopTraining(_describe(found.request))
        try:
            handler(found.request)
        except StopTraining:
            raise
        except Exception as error:  # whatever a checkpoint failed of, training goes on without it
            logger.exception("gradiometer: on_request[%r] failed, and training goes on", kind)
            said = f"{type(error).__name__}: {error}"[:MAX_NOTE]
            self._answer(found, "request_failed", f"on_request[{kind!r}] failed: {said}", reasons=[said])
            return
        if kind != "stop":  # which is done when the loop is left
            self.done(kind)

    # For the thread.

    def heeds(self, kind: str) -> bool:
        """Whether the loop has shown that it looks for requests of this kind; from any thread."""
        return kind in self._handlers or kind in self._polled

    def objections(self, request: LoopRequest) -> list[str]:
        """Say why the loop cannot be asked, if it cannot; from any thread."""
        kind = request.kind
        if not self.heeds(kind):
            return [
                f"the job does not look for it: its loop must ask agent.requested({kind!r}) after each step, or give "
                f"attach(on_request={{{kind!r}: function}})"
            ]
        before = self._delivered.get(kind)
        if before is not None and not before.answered and (kind == "stop" or not before.seen):
            return [f"it is asked for already, by request {before.request.id} of {before.request.by or 'unknown'}"]
        return []

    def refuse(self, request: LoopRequest | None, identity: str, reasons: Sequence[str]) -> None:
        """Tell that a request was refused, None where it was none; from any thread."""
        said = f"{_describe(request) if request else 'a request'}: refused: {'; '.join(reasons)}"
        logger.warning("gradiometer: %s", said)
        with contextlib.suppress(OSError):
            self._telemetry.recorder.event(
                "request_refused", said, request=identity, asked=request.kind if request else None,
                by=request.by if request else "", reasons=list(reasons),
            )  # fmt: skip

    def tend(self) -> None:
        """Tell of what has been unanswered for long, once; from any thread."""
        for found in list(self._delivered.values()):
            waits = not (found.answered or found.late) and self.heeds(found.request.kind)
            if waits and time.monotonic() - found.at > UNANSWERED_SECONDS:
                found.late = True
                did = "has seen it and not said agent.done()" if found.seen else "has not looked for it"
                self._tell("request_unanswered", found.request, f"the loop {did} for {UNANSWERED_SECONDS:.0f} s")

    def close(self) -> None:
        """Answer what is open: the training ends. Idempotent."""
        for found in self._delivered.values():
            if self.heeds(found.request.kind) and not found.answered:
                if found.request.kind == "stop":
                    self._answer(found, "request_done", f"training ended after step {self._next_step() - 1}")
                else:
                    self._give_up(found, "the training ended")

    def _give_up(self, found: _Delivered, when: str) -> None:
        did = "said agent.done()" if found.seen else "looked for it"
        if not found.answered:
            said = f"{when} before the loop {did}"
            self._answer(found, "request_failed", said, reasons=[said])

    def _answer(self, found: _Delivered, kind: str, said: str, **data: Any) -> None:
        with self._lock:
            if found.answered:
                return
            found.answered = True
        self._tell(kind, found.request, said, self._next_step() - 1, **data)

    def _tell(self, kind: str, request: LoopRequest, said: str, step: int | None = None, **data: Any) -> None:
        message = f"{_describe(request)}: {said}"
        logger.info("gradiometer: %s", message)
        self._telemetry.notice(
            kind, message, step=step, request=request.id, asked=request.kind, by=request.by, note_asked=request.note,
            **data,
        )  # fmt: skip


def _describe(request: LoopRequest) -> str:
    why = f" ({request.note})" if request.note else ""
    return f"request {request.kind!r} of {request.by or 'unknown'}{why}"
