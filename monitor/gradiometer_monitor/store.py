"""What the monitor remembers over its restarts: the events of all runs, and how far each service has come.

One SQLite file in the state directory, which one monitor at a time holds. Guarantees: an event is kept once, by its id,
and gets a number that only grows; an event and the place it was read from are written together, so that none is read
twice or passed over; the file is bounded. Without a directory that can be written the monitor works from memory. A file
that is damaged is set aside, with a warning, and another begun.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from logging import getLogger
from pathlib import Path
from typing import Any

__all__ = ["Event", "Store"]

log = getLogger(__name__)

DATABASE, LOCK = "monitor.sqlite", "lock"
MAX_EVENTS = 200_000
"""The oldest events are forgotten beyond this; some hundred bytes each."""
TRIM_EVERY = 1000
BUSY_SECONDS = 10.0
FAILING_SECONDS = 20.0
"""How long a write that failed counts though a later one succeeded: a small one may fit where a large one does not,
which is tried again within that."""
TRIED = "store/tried"
VERSION = 1
"""Of the schema, as ``user_version`` in the file."""
ASIDE = f"{DATABASE}.damaged"
"""Where a damaged file is kept for whoever wants to look; the next one takes its place."""
SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, run_id TEXT NOT NULL, rank INTEGER,
    time_ns INTEGER NOT NULL, kind TEXT NOT NULL, step INTEGER, message TEXT NOT NULL, data TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS events_of_runs ON events (run_id, number);
CREATE TABLE IF NOT EXISTS notes (key TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """Something that happened to a run, told by its job or by the monitor."""

    id: str
    """Unique and the same over restarts: of the file and the place that it was read from, or of the monitor."""
    run_id: str
    rank: int | None = None
    """None for what the monitor tells."""
    time_ns: int
    """Wall clock, nanoseconds since the epoch."""
    kind: str
    message: str = ""
    step: int | None = None
    data: dict[str, Any] = field(default_factory=dict)
    """What else the event says, as JSON can."""
    number: int = 0
    """Place in the order in which the monitor heard of events; 0 before it is stored."""


class Store:
    """The events and notes of one monitor; safe to use from several threads.

    ``directory`` None keeps everything in memory. Raises OSError or sqlite3.Error where the directory cannot be used;
    :meth:`open` falls back to memory instead.
    """

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory
        self._lock, self._added = threading.RLock(), 0
        self._held: int | None = None
        self._file: tuple[int, int] | None = None
        """Device and inode of the database."""
        self._warned = False
        self._failed_at, self._last_failed = -math.inf, False
        """When a write last failed (monotonic), and whether none has succeeded since."""
        if directory is None:
            self._base = _connect(":memory:")
            return
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._held = _hold(directory / LOCK)
        try:
            self._base = _open(directory / DATABASE)
            self._file = _identity(directory / DATABASE)
        except BaseException:
            self._release()
            raise

    @classmethod
    def open(cls, directory: Path) -> Store:
        """Open the store in a directory, or one in memory, with a warning, where that cannot be used."""
        try:
            return cls(directory)
        except (OSError, sqlite3.Error) as error:
            log.warning(
                "state_dir %s cannot be used (%s): nothing is remembered over a restart, and nothing from before this "
                "start is pushed or annotated; %s with --state-dir",
                directory,
                error,
                "give this monitor a directory of its own"
                if isinstance(error, BlockingIOError)
                else "make room there, let this user write there, or name another directory",
            )
            return cls(None)

    @property
    def persistent(self) -> bool:
        """Whether what is stored outlives the process.

        Not from memory, nor from a file that somebody has removed, nor while writes fail, as on a full disk, and for
        ``FAILING_SECONDS`` after.
        """
        if self.directory is None:
            return False
        there = _identity(self.directory / DATABASE) == self._file
        if not there and not self._warned:
            self._warned = True
            log.warning(
                "%s was removed or replaced: what is stored from now on goes with the process; restart the monitor",
                self.directory / DATABASE,
            )
        failing = self._last_failed or time.monotonic() - self._failed_at < FAILING_SECONDS
        return there and not failing

    def try_again(self) -> None:
        """Write a note if the last write failed: nothing else tells whether there is room again. Never raises."""
        if self._last_failed:
            with suppress(sqlite3.Error):
                self.put(TRIED, time.time())

    def note(self, key: str, default: Any = None) -> Any:
        """Return what was noted under ``key``, as JSON gives it, or ``default``."""
        with self._lock:
            found = self._base.execute("SELECT value FROM notes WHERE key = ?", (key,)).fetchone()
        return default if found is None else json.loads(found[0])

    def notes(self, prefix: str) -> dict[str, Any]:
        """Return all notes whose key begins with ``prefix``."""
        with self._lock:
            found = self._base.execute(
                "SELECT key, value FROM notes WHERE substr(key, 1, ?) = ?", (len(prefix), prefix)
            ).fetchall()
        return {key: json.loads(value) for key, value in found}

    def put(self, key: str, value: Any) -> None:
        """Note ``value``, which JSON can hold, under ``key``; None forgets it."""
        with self._written():
            self._put(key, value)

    @contextmanager
    def _written(self) -> Iterator[None]:
        """Hold the lock for one transaction, and remember whether it could be written."""
        with self._lock:
            try:
                with self._base:
                    yield
            except sqlite3.Error:
                self._failed_at, self._last_failed = time.monotonic(), True
                raise
            self._last_failed = False

    def _put(self, key: str, value: Any) -> None:
        if value is None:
            self._base.execute("DELETE FROM notes WHERE key = ?", (key,))
        else:
            self._base.execute("REPLACE INTO notes VALUES (?, ?)", (key, json.dumps(value)))

    def add(self, events: Iterable[Event], notes: dict[str, Any] | None = None) -> None:
        """Keep events, those known by their id being passed over, and write notes, all of it or nothing."""
        rows = [
            (e.id, e.run_id, e.rank, e.time_ns, e.kind, e.step, e.message, json.dumps(e.data, default=str))
            for e in events
        ]
        with self._written():
            self._base.executemany(
                "INSERT OR IGNORE INTO events (id, run_id, rank, time_ns, kind, step, message, data) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                rows,
            )
            for key, value in (notes or {}).items():
                self._put(key, value)
            self._added += len(rows)
            if self._added >= TRIM_EVERY:
                self._added = 0
                self._base.execute(
                    "DELETE FROM events WHERE number <= (SELECT max(number) FROM events) - ?", (MAX_EVENTS,)
                )

    def events(
        self,
        *,
        run_id: str | None = None,
        kinds: Sequence[str] = (),
        after: int | None = None,
        before: int | None = None,
        limit: int = 100,
    ) -> list[Event]:
        """Return stored events by number: the first ``limit`` above ``after``, or else the last below ``before``."""
        conditions, values = ["1"], []
        for condition, value in (("run_id = ?", run_id), ("number > ?", after), ("number < ?", before)):
            if value is not None:
                conditions.append(condition)
                values.append(value)
        if kinds:
            conditions.append(f"kind IN ({','.join('?' * len(kinds))})")
            values += kinds
        order = "ASC" if after is not None else "DESC"
        query = f"SELECT * FROM events WHERE {' AND '.join(conditions)} ORDER BY number {order} LIMIT ?"  # noqa: S608
        with self._lock:
            rows = self._base.execute(query, (*values, limit)).fetchall()
        found = [_event(row) for row in rows]
        return found if after is not None else found[::-1]

    def count(self, *, after: int, kinds: Sequence[str]) -> int:
        """Count the events of these kinds with a number above ``after``."""
        query = f"SELECT count(*) FROM events WHERE number > ? AND kind IN ({','.join('?' * len(kinds))})"  # noqa: S608
        with self._lock:
            return int(self._base.execute(query, (after, *kinds)).fetchone()[0])

    @property
    def newest(self) -> int:
        """Number of the newest event; 0 if there is none."""
        with self._lock:
            return int(self._base.execute("SELECT coalesce(max(number), 0) FROM events").fetchone()[0])

    def close(self) -> None:
        """Close the file and let another monitor have it. Idempotent."""
        with self._lock:
            self._base.close()
            self._release()

    def _release(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            os.close(held)


def _open(path: Path) -> sqlite3.Connection:
    """Open the file, or set it aside and begin another if it is damaged. Raises OSError or sqlite3.Error."""
    try:
        return _connect(str(path))
    except sqlite3.DatabaseError as error:
        if type(error) is not sqlite3.DatabaseError:  # a full disk, a missing permission, a newer version: no damage
            raise
        aside = path.with_name(ASIDE)
        for suffix in ("-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        path.replace(aside)
        log.warning(
            "%s is damaged (%s) and was set aside as %s: a new one is begun, so events and cursors of before are not "
            "known, and what the run directories still hold is read anew",
            path,
            error,
            aside.name,
        )
        return _connect(str(path))


def _connect(where: str) -> sqlite3.Connection:
    """Open a file and see to its schema. Raises sqlite3.DatabaseError, and none of its subclasses, if it is damaged."""
    base = sqlite3.connect(where, timeout=BUSY_SECONDS, check_same_thread=False)
    try:
        if where != ":memory:":
            Path(where).chmod(0o600)
            base.execute("PRAGMA journal_mode=WAL")
            base.execute("PRAGMA synchronous=NORMAL")
        _check(base)
        base.executescript(f"{SCHEMA}PRAGMA user_version = {VERSION};")
    except BaseException:
        base.close()
        raise
    return base


def _check(base: sqlite3.Connection) -> None:
    found = base.execute("PRAGMA quick_check(1)").fetchone()[0]
    if found != "ok":
        raise sqlite3.DatabaseError(found)
    version = base.execute("PRAGMA user_version").fetchone()[0]
    if version > VERSION:
        raise sqlite3.NotSupportedError(f"the file is of version {version}, this monitor knows {VERSION}: update it")


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _hold(path: Path) -> int:
    """Lock a file for as long as its descriptor is open; raises BlockingIOError if another monitor holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise BlockingIOError(f"another monitor uses it: {path}") from error
    return descriptor


def _event(row: tuple[Any, ...]) -> Event:
    number, identity, run_id, rank, time_ns, kind, step, message, data = row
    return Event(
        number=number, id=identity, run_id=run_id, rank=rank, time_ns=time_ns, kind=kind, step=step, message=message,
        data=json.loads(data),
    )  # fmt: skip
