"""The events of all runs in one place: read from their directories as they are written, or told by the monitor.

Guarantees: an event is kept once, also over restarts of the monitor; a poll reads a bounded number of bytes of each
rank; while the store cannot be written nothing is passed over: what jobs wrote is read later, and of what the monitor
tells the last :data:`MAX_UNTOLD` wait.
"""

from __future__ import annotations

import json
import math
import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from logging import getLogger
from pathlib import Path
from typing import Any
from zlib import crc32

from gradiometer.rank_files import open_file
from gradiometer.tail import RankTail, identity
from gradiometer_monitor.following.runs import Runs
from gradiometer_monitor.store import Event, Store

__all__ = ["Events"]

log = getLogger(__name__)

OWN_KEYS = ("kind", "message", "step", "time_ns")
CHUNK_BYTES = 2**20
"""Bytes of one rank's ``events.jsonl`` that a poll reads at most; a longer line is passed over as ``unreadable``."""
EVENT_BYTES = 16 * 2**10
"""An event whose line is longer is kept without its further fields."""
MESSAGE_LENGTH, KIND_LENGTH = 4000, 64
MAX_UNTOLD = 1000
"""Events of the monitor that wait while the store cannot be written; beyond it the oldest are lost, but logged."""


class Events:
    """Follows ``events.jsonl`` of every rank of ``runs`` into ``store``; :meth:`tell` adds what the monitor saw."""

    def __init__(self, runs: Runs, store: Store) -> None:
        self.store = store
        self._runs = runs
        self._listeners: list[Callable[[], None]] = []
        self._offsets: dict[str, int] = {}
        self._warned: set[str] = set()
        self._untold: deque[tuple[Event, dict[str, Any]]] = deque(maxlen=MAX_UNTOLD)
        self._telling = threading.Lock()

    def listen(self, listener: Callable[[], None]) -> None:
        """Have ``listener`` called, from any thread, when there may be new events; it must be quick and not raise."""
        self._listeners.append(listener)

    def forget(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` no more. Does nothing for one that is not called."""
        with suppress(ValueError):
            self._listeners.remove(listener)

    def follow(self) -> bool:
        """Read what was written since the last time, and tell whether there is more; for the thread that polls."""
        with self._runs.snapshot() as runs:
            tails = [tail for run in runs for tail in run.ranks]
        keys = {_key(tail): tail for tail in tails}
        self._offsets = {key: offset for key, offset in self._offsets.items() if key in keys}
        grown = [self._follow(key, tail) for key, tail in keys.items()]
        if self._retry() or any(grown):
            self._announce()
        return any(grown)

    def _follow(self, key: str, tail: RankTail) -> bool:
        """Read a part of what came, and tell whether there was any."""
        path = tail.path / "events.jsonl"
        try:
            offset = self._offsets.get(key)
            offset = int(self.store.note(key, 0)) if offset is None else offset
            self._offsets[key] = offset
            if path.lstat().st_size == offset:
                return False
            found, end = _read(path, offset)
            if end == offset or identity(tail.path) != tail.identity:
                return False  # of a later start, the events are its own
            self.store.add([_event(tail, raw, place) for place, raw in found], {key: end})
        except FileNotFoundError:
            return False
        except sqlite3.Error as error:
            self._warn("", NOT_KEPT, self.store.directory, error)
            return False
        except (OSError, ValueError) as error:
            self._warn(key, "events of %s cannot be read, and will be tried again: %s", path, error)
            return False
        self._offsets[key] = end
        self._warned -= {key, ""}
        return True

    def _warn(self, key: str, message: str, *values: object) -> None:
        """Log once until it succeeds."""
        if key not in self._warned:
            self._warned.add(key)
            log.warning(message, *values)

    def tell(
        self,
        run_id: str,
        kind: str,
        message: str,
        *,
        step: int | None = None,
        once: str | None = None,
        time_ns: int | None = None,
        notes: dict[str, Any] | None = None,
        **data: Any,
    ) -> Event:
        """Keep an event that the monitor itself has to tell, and log it; return it.

        ``once`` names it within the run: another of that name is not kept, now or after a restart. ``time_ns`` is when
        it happened, now unless given. ``notes`` are written to the store together with it.
        """
        now, message = time.time_ns(), message.encode("utf-8", "replace").decode()  # half a surrogate cannot be kept
        event = Event(
            id=f"{run_id}/monitor/{once or f'{now:x}'}/{kind}", run_id=run_id, kind=kind, message=message,
            time_ns=_count(time_ns) or now, step=_count(step), data=data,
        )  # fmt: skip
        log.info("run %s: %s: %s", run_id, kind, message)
        with self._telling:
            self._untold.append((event, notes or {}))
        if self._retry():
            self._announce()
        return event

    def _retry(self) -> bool:
        """Keep what was told and is not kept yet; tell whether there was any."""
        kept = False
        with self._telling:
            while self._untold:
                event, notes = self._untold[0]
                try:
                    self.store.add([event], notes)
                except sqlite3.Error as error:
                    self._warn("", NOT_KEPT, self.store.directory, error)
                    break
                self._untold.popleft()
                kept = True
                self._warned.discard("")
        return kept

    def _announce(self) -> None:
        for listener in tuple(self._listeners):
            listener()


def _key(tail: RankTail) -> str:
    return f"events/{tail.run_id}/{tail.rank}/{tail.manifest.created_ns}"


NOT_KEPT = "events cannot be kept in state_dir %s (%s): make room there; they wait, and will be tried again"
Lines = list[tuple[str, dict[str, Any]]]


def _read(path: Path, offset: int) -> tuple[Lines, int]:
    """Read complete lines from byte ``offset``, each with a name of its place, and return the offset after the last.

    A file that is shorter was cut: it is read from its start, and ids keep from being told twice what is still there.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = offset if size >= offset else 0
        text = os.pread(file.fileno(), CHUNK_BYTES, start) if size > start else b""
    end = text.rfind(b"\n") + 1
    if not end and len(text) == CHUNK_BYTES:
        return [(str(start), {"message": f"a line of more than {CHUNK_BYTES} bytes"})], start + len(text)
    return list(_lines(text[:end], start)), start + end


def _lines(text: bytes, offset: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name each line by its offset and its content: where a file was cut, another may take the place of the first."""
    for line in text.split(b"\n")[:-1]:
        yield f"{offset}.{crc32(line):x}", _parse(line)
        offset += len(line) + 1


def _parse(line: bytes) -> dict[str, Any]:
    """Read a line as values that any JSON can hold: None for a number that is not finite, '?' for half a surrogate."""
    try:
        event = json.loads(line, parse_constant=lambda _: None, parse_float=_finite)
        event = json.loads(json.dumps(event, ensure_ascii=False).encode("utf-8", "replace"))
    except (ValueError, RecursionError):
        event = None
    if not isinstance(event, dict):
        return {"kind": "unreadable", "line": line[:MESSAGE_LENGTH].decode("utf-8", "replace")}
    if len(line) > EVENT_BYTES:
        return {key: event.get(key) for key in OWN_KEYS} | {"left_out_bytes": len(line)}
    return event


def _finite(text: str) -> float | None:
    number = float(text)
    return number if math.isfinite(number) else None


def _event(tail: RankTail, raw: dict[str, Any], place: str) -> Event:
    """Make an event of a line that a job wrote, of which nothing can be relied upon."""
    step, time_ns = raw.get("step"), raw.get("time_ns")
    return Event(
        id=f"{tail.run_id}/{tail.rank}/{tail.manifest.created_ns:x}/{place}",
        run_id=tail.run_id,
        rank=tail.rank,
        time_ns=_count(time_ns) or _count(tail.manifest.created_ns) or 0,
        kind=str(raw.get("kind", "unreadable"))[:KIND_LENGTH],
        message=str(raw.get("message", ""))[:MESSAGE_LENGTH],
        step=_count(step),
        data={key: value for key, value in raw.items() if key not in OWN_KEYS},
    )


def _count(value: object) -> int | None:
    """Return a whole number that the store can hold, or None."""
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63 else None
