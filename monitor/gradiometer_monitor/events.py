"""The events of all runs in one place: read from their directories as they are written, or told by the monitor."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from logging import getLogger
from typing import Any

from gradiometer.records import read_events
from gradiometer.tail import RankTail
from gradiometer_monitor.runs import Runs
from gradiometer_monitor.store import Event, Store

__all__ = ["Events"]

log = getLogger(__name__)

OWN_KEYS = ("kind", "message", "step", "time_ns")


class Events:
    """Follows ``events.jsonl`` of every rank of ``runs`` into ``store``; :meth:`tell` adds what the monitor saw."""

    def __init__(self, runs: Runs, store: Store) -> None:
        self.store = store
        self._runs = runs
        self._listeners: list[Callable[[], None]] = []

    def listen(self, listener: Callable[[], None]) -> None:
        """Have ``listener`` called, from any thread, when there may be new events; it must be quick and not raise."""
        self._listeners.append(listener)

    def follow(self) -> None:
        """Read what was written since the last time; for the thread that polls the runs, after a poll."""
        with self._runs.snapshot() as runs:
            tails = [tail for run in runs for tail in run.ranks]
        grown = [self._follow(tail) for tail in tails]
        if any(grown):
            self._announce()

    def _follow(self, tail: RankTail) -> bool:
        key = f"events/{tail.run_id}/{tail.rank}/{tail.manifest.created_ns}"
        offset = int(self.store.note(key, 0))
        try:
            found, end = read_events(tail.path / "events.jsonl", offset)
            if end == offset:
                return False
            self.store.add([_event(tail, raw, f"{offset}.{place}") for place, raw in enumerate(found)], {key: end})
        except (OSError, ValueError, sqlite3.Error) as error:
            log.warning("events of %s cannot be read, and will be tried again: %s", tail.path, error)
            return False
        return True

    def tell(
        self,
        run_id: str,
        kind: str,
        message: str,
        *,
        step: int | None = None,
        notes: dict[str, Any] | None = None,
        **data: Any,
    ) -> Event:
        """Keep an event that the monitor itself has to tell, and notes of the store with it, and log it; return it."""
        now = time.time_ns()
        event = Event(
            id=f"{run_id}/monitor/{now:x}/{kind}", run_id=run_id, time_ns=now, kind=kind, message=message, step=step,
            data=data,
        )  # fmt: skip
        log.info("run %s: %s: %s", run_id, kind, message)
        self.store.add([event], notes)
        self._announce()
        return event

    def _announce(self) -> None:
        for listener in self._listeners:
            listener()


def _event(tail: RankTail, raw: dict[str, Any], place: str) -> Event:
    """Make an event of a line that a job wrote, of which nothing can be relied upon."""
    step, time_ns = raw.get("step"), raw.get("time_ns")
    return Event(
        id=f"{tail.run_id}/{tail.rank}/{tail.manifest.created_ns:x}/{place}",
        run_id=tail.run_id,
        rank=tail.rank,
        time_ns=time_ns if isinstance(time_ns, int) else tail.manifest.created_ns,
        kind=str(raw.get("kind", "unreadable")),
        message=str(raw.get("message", "")),
        step=step if isinstance(step, int) else None,
        data={key: value for key, value in raw.items() if key not in OWN_KEYS},
    )
