"""Call a user's functions off the step path: a thread for each call, one call at a time, each with a time limit.

Guarantees: a call never blocks the step, a function that is still running is not started again, at most
:data:`QUEUED` calls wait, and a function that outstays its time is left behind on its daemon thread and counted. A
forked child has no such thread and starts none.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias
from weakref import finalize, ref

__all__ = ["ActionCall", "Callback", "Callbacks", "Outcome"]

logger = logging.getLogger(__name__)
QUEUED = 16
"""Calls that may wait for their turn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ActionCall:
    """What a callback is told."""

    run_id: str
    rank: int
    step: int
    """Step whose row met the condition; training is some steps further by now."""
    action: str
    condition: str
    numbers: Mapping[str, float]
    path: Path
    """This rank's directory of the run."""


Callback = Callable[[ActionCall], object]


_Calls: TypeAlias = "queue.SimpleQueue[tuple[str, ActionCall, float] | None]"
"""Of the simple kind, into which a finalizer may put at any time."""


class Outcome(Protocol):
    """Is told of every call that began, and of every failure."""

    def __call__(self, failure: str | None, call: ActionCall, name: str) -> None: ...


class Callbacks:
    """The functions of one agent. ``told`` is called on the threads here, ``failure`` None where a call begins."""

    def __init__(self, functions: Mapping[str, Callback], told: Outcome) -> None:
        self._functions, self._told, self._pid = dict(functions), told, os.getpid()
        self._queue: _Calls = queue.SimpleQueue()
        self._submitted = self._done = 0
        """Calls so far: one is counted by the training thread alone, the other by the dispatcher alone."""
        self._running: dict[str, threading.Thread] = {}
        self._dispatcher: threading.Thread | None = None
        self._closed, self._longest = False, 0.0
        finalize(self, self._queue.put, None).atexit = False

    def start(self) -> None:
        """Start the thread that starts the calls; nothing if it runs."""
        if self._dispatcher is None and os.getpid() == self._pid:
            dispatcher = threading.Thread(
                target=_dispatch, args=(ref(self), self._queue), name="gradiometer-callbacks", daemon=True
            )
            dispatcher.start()
            self._dispatcher = dispatcher

    @property
    def calling(self) -> bool:
        """Whether it is one of the functions here that asks."""
        return threading.current_thread() in [*self._running.values()]  # which the dispatcher may be adding to

    def submit(self, name: str, call: ActionCall, timeout: float) -> None:
        """Have a function called soon; a call that cannot wait is a failure."""
        if self._closed or os.getpid() != self._pid:
            return
        try:
            self.start()
        except RuntimeError as error:
            self._told(f"it could not be started: {error}", call, name)
            return
        self._longest = max(self._longest, timeout)
        if self._queue.qsize() >= QUEUED:
            self._told(f"{QUEUED} calls are waiting already", call, name)
            return
        self._submitted += 1
        self._queue.put((name, call, timeout))

    def close(self) -> None:
        """Wait for the calls under way, at most the longest time that one of them may take. Idempotent."""
        if self._closed or self._dispatcher is None or os.getpid() != self._pid:
            return
        self._closed, until = True, time.monotonic() + self._longest
        while self._done < self._submitted and time.monotonic() < until and self._dispatcher.is_alive():
            time.sleep(0.002)
        with contextlib.suppress(queue.Empty):
            while (item := self._queue.get_nowait()) is not None:
                self._told("the agent was detached before its turn", item[1], item[0])
        self._queue.put(None)
        self._dispatcher.join(timeout=1.0)

    def take(self, name: str, call: ActionCall, timeout: float) -> None:
        """See a call through, for the dispatcher."""
        try:
            self._start(name, call, timeout)
        except Exception as error:  # no thread could be made, or nobody could be told
            logger.exception("gradiometer: callback %s could not be started", name)
            self._told(f"it could not be started: {error}", call, name)
        self._done += 1

    def _start(self, name: str, call: ActionCall, timeout: float) -> None:
        previous = self._running.get(name)
        if previous is not None and previous.is_alive():
            self._told("the call before is still running, so it was not started again", call, name)
            return
        failures: list[str] = []
        thread = threading.Thread(
            target=self._call, args=(name, call, failures), name=f"gradiometer-{name}", daemon=True
        )
        self._running[name] = thread
        self._told(None, call, name)
        thread.start()
        thread.join(timeout)
        if thread.is_alive():
            failures.append(f"it was still running after {timeout:g} s and is left behind")
            logger.error("gradiometer: callback %s: %s", name, failures[0])
        for failure in failures[:1]:
            self._told(failure, call, name)

    def _call(self, name: str, call: ActionCall, failures: list[str]) -> None:
        try:
            self._functions[name](call)
        except BaseException as error:  # whatever it is must not end the thread without a word
            failures.append(f"{type(error).__name__}: {error}")
            logger.exception("gradiometer: callback %s failed", name)


def _dispatch(callbacks: ref[Callbacks], calls: _Calls) -> None:
    """Start one call after the other; keep nothing alive in between, for functions hold models."""
    while (item := calls.get()) is not None:
        mine = callbacks()
        if mine is None:
            return
        mine.take(*item)
        del mine, item
