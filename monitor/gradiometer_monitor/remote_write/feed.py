"""Read one rank's ring from a cursor on, as blocks of samples. The ring is the queue: on disk, and bounded.

Guarantees: a row is sent whole, after those before it; what the ring overtook, or is too old, or finds no place in
time, is counted. A cursor moves only when what was read up to it has been settled.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gradiometer.process import process_alive
from gradiometer.records import Manifest, RingReader, Rows, State, rank_of
from gradiometer_monitor.remote_write.clock import place
from gradiometer_monitor.remote_write.columns import Columns, Key
from gradiometer_monitor.remote_write.protocol import STALE, Block, Series
from gradiometer_monitor.remote_write.settings import RemoteWriteSettings

__all__ = ["Cursor", "Feed", "Reading", "key_of"]

READ_BYTES = 8 * 2**20
"""Rows that are read at once; a row that is larger is read alone."""
SETTLE_SECONDS = 5.0
"""The newest row waits for the next one, or this long: the job may still add its loss."""
ALIVE_SECONDS = 1.0
"""Pause between two looks at whether the process lives."""
SILENT_SECONDS = 900.0
"""Where the process cannot be seen, a run is over when it was silent for this long."""
FUTURE_SECONDS = 600.0
"""A row further ahead of this host's clock is not sent: one of next year makes Prometheus refuse all of today."""
TORN_ROWS = 64
"""Rows in a row that may be unreadable where a run that was there before is begun."""
STALE_AFTER_MS = 15_000
"""A series ends when its run was seen to be over, at most this long after its last sample: a marker right behind the
sample would hide it from every query that looks later."""
Integers = npt.NDArray[np.int64]


def key_of(receiver: str, run_id: str, rank: int, created_ns: int) -> str:
    """Name the note of a cursor."""
    return f"remote_write/{receiver}/{run_id}/{rank}/{created_ns}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cursor:
    """How far a receiver has got with one start of one rank."""

    sequence: int = 0
    attempted: int = 0
    """How far what was on its way reached, when the cursor was noted."""
    newest_ms: int = 0
    """Newest timestamp that was given."""
    open: frozenset[Key] = frozenset()
    """Series that have a sample and no end."""
    done: bool = False
    """All is sent and the series are ended."""

    def to_json(self) -> dict[str, Any]:
        """Return all but :attr:`open`, which is long and changes seldom."""
        return {
            "sequence": self.sequence, "attempted": self.attempted, "newest_ms": self.newest_ms, "done": self.done,
        }  # fmt: skip

    @classmethod
    def from_json(cls, note: dict[str, Any], keys: Sequence[Sequence[str]]) -> Cursor:
        return cls(**note, open=frozenset(map(tuple, keys)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What one read gave: something to send, or only a cursor that moves."""

    cursor: Cursor
    """Where the feed is once this is settled."""
    blocks: tuple[Block, ...] = ()
    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Rows, by reason."""
    lost: int = 0
    """Samples of series that cannot be sent."""
    provisional: tuple[int, int] | None = None
    """Sequence and checksum of a row that may still be amended, and is not behind the cursor."""


class Feed:
    """One start of one rank. Raises OSError or RunFormatError if its ring cannot be read."""

    def __init__(self, path: Path, manifest: Manifest, settings: RemoteWriteSettings, cursor: Cursor) -> None:
        self.path, self.manifest, self.cursor = path, manifest, cursor
        self.run_id, self.rank = path.parent.name, rank_of(path)
        self.key = key_of(settings.name, self.run_id, self.rank, manifest.created_ns)
        self.columns = Columns(path, self.run_id, self.rank, manifest, settings)
        self._attempted = cursor.attempted
        self.superseded = False
        """There is a later start of the same rank."""
        self.told: set[str] = set()
        """Reasons for drops that were told as an event."""
        self._settings = settings
        self._ring = RingReader(path / "steps.ring", manifest.ring)
        self._row_limit = max(1, READ_BYTES // manifest.ring.dtype.itemsize)
        self._provisional: tuple[int, int] | None = None
        self._head, self._head_since = -1, 0.0
        self._over, self._hidden, self._looked_at = False, False, 0.0
        self.pending_rows, self.pending_since = 0, 0.0
        """Rows that are not settled, and when the oldest of them was written, in seconds since the epoch."""

    def begin(self, *, after: float | None) -> None:
        """Place a first cursor: before the first row at or after a time, seconds since the epoch; None: at the end."""
        head = int(self._ring.status()["head"])
        if after is None:
            self.cursor = replace(self.cursor, sequence=head)
            return
        if after <= 0:
            return
        low, high = max(0, head - self.manifest.ring.capacity), head
        while low < high:  # rows are in the order of time
            middle = (low + high) // 2
            rows = self._ring.read(middle, TORN_ROWS)
            early = not len(rows) or int(rows["time_ns"][0]) < after * 1e9
            low, high = (middle + 1, high) if early else (low, middle)
        self.cursor = replace(self.cursor, sequence=low)

    def read(self, samples: int, now: float) -> Reading | None:
        """Read rows of about that many samples; None if there is nothing to do. ``now`` is in epoch seconds."""
        over, head = self.look()
        final, done = head if over else head - 1, self.cursor.sequence
        if self.repeats:  # the same rows again: a receiver takes all or nothing of a request
            final = min(final, self._attempted)
        if final > done:
            count = max(1, min(self._row_limit, samples // self.columns.width))
            first = max(done + 1, head + 1 - self.manifest.ring.capacity)
            return self._read(first, min(final, first - 1 + count), now)
        if head > done and self._settled() and not self._sent_newest:
            return self._read_newest(head, now)
        return self._end(now) if over and not self.cursor.done else None

    def settled(self, reading: Reading) -> None:
        """Move on, what was read having been sent, or counted."""
        self.cursor, self._provisional = reading.cursor, reading.provisional
        self.pending_since = 0.0
        self._count_pending()

    @property
    def repeats(self) -> bool:
        """The receiver may have had what comes next: it was sent, and then the monitor ended."""
        return self._attempted > self.cursor.sequence

    def rewind(self, cursor: Cursor) -> None:
        """Go back to an earlier cursor, to send again from there."""
        self.cursor, self._provisional, self._attempted = cursor, None, 0
        self._count_pending()

    def close(self) -> None:
        """Close the ring. Idempotent."""
        self._ring.close()

    def look(self) -> tuple[bool, int]:
        """Tell whether the run is over, and its newest row; see how many rows wait."""
        now, alive = time.monotonic(), None
        if not self._over and now - max(self._looked_at, self._head_since) >= ALIVE_SECONDS:
            # The process first: it cannot have written anything after it was gone.
            self._looked_at, alive = now, process_alive(self.manifest)
            self._hidden = alive is None
        status = self._ring.status()
        heartbeat = max(int(status["heartbeat_ns"]), self.manifest.created_ns) / 1e9
        silent = self._hidden and time.time() - heartbeat > SILENT_SECONDS
        over = int(status["state"]) == State.FINISHED or alive is False or silent
        head = int(status["head"])
        if head != self._head:
            self._head, self._head_since = head, now
            self._over = False  # it was thought to be over, and writes
        self._over = self._over or over
        self._count_pending()
        return self._over, head

    def _count_pending(self) -> None:
        self.pending_rows = max(0, self._head - self.cursor.sequence - self._sent_newest)
        if self.pending_rows == 0:
            self.pending_since = 0.0
        elif self.pending_since == 0.0:
            self.pending_since = time.time()

    def _settled(self) -> bool:
        return time.monotonic() - self._head_since >= SETTLE_SECONDS

    @property
    def _sent_newest(self) -> bool:
        """The newest row has been sent as it was, though it is not final."""
        return self._provisional is not None and self._provisional[0] == self._head

    def _read(self, first: int, last: int, now: float) -> Reading:
        """Read final rows; those that are missing never will be there."""
        done = self.cursor.sequence
        rows = self._ring.read(first - 1, last + 1 - first)
        rows, last = _one_revision(rows[rows["begin"] <= last], last)
        missing = last - done - len(rows)
        behind = max(first, int(self._ring.status()["head"]) + 2 - self.manifest.ring.capacity) - 1 - done
        overtaken = min(missing, behind)
        dropped = Counter(overtaken=overtaken, unreadable=missing - overtaken)
        block_rows, times, newest, fresh = self._place(rows, dropped, now)
        blocks, lost, opened = self._blocks(block_rows, times)
        cursor = Cursor(sequence=last, newest_ms=newest, open=opened)
        return Reading(cursor=cursor, blocks=blocks, rows=fresh, dropped=dropped, lost=lost)

    def _read_newest(self, sequence: int, now: float) -> Reading | None:
        """Read the newest row while it is not final. The cursor stays: if it is amended, it is sent again."""
        rows = self._ring.read(sequence - 1, 1)
        if not len(rows) or int(rows["begin"][0]) != sequence:
            return None  # it is being amended, or has a successor
        dropped = Counter[str]()
        kept, times, _, _ = self._place(rows, dropped, now)
        blocks, lost, opened = self._blocks(kept, times)
        mark = (sequence, int(rows["checksum"][0]))
        return Reading(cursor=replace(self.cursor, open=opened), blocks=blocks, lost=lost, provisional=mark)

    def _place(self, rows: Rows, dropped: Counter[str], now: float) -> tuple[Rows, Integers, int, int]:
        """Give rows their timestamps and leave out those that are not to be sent.

        Return rows, timestamps, the newest timestamp, and how many rows have been or will be sent.
        """
        if len(rows):
            self.pending_since = int(rows["time_ns"][0]) / 1e9
        sane = rows["time_ns"] <= (now + FUTURE_SECONDS) * 1e9
        dropped["future"] += int(np.count_nonzero(~sane))
        rows = rows[sane]
        window = int(self._settings.out_of_order_seconds * 1000)
        placed = place(rows["time_ns"].astype(np.int64), self.cursor.newest_ms, window_ms=window)
        fresh = rows["time_ns"] >= (now - self._settings.max_age_seconds) * 1e9
        dropped += placed.dropped
        dropped["too_old"] += int(np.count_nonzero(placed.kept & ~fresh))
        kept = placed.kept & fresh
        count = int(np.count_nonzero(kept))
        if len(rows) and self._provisional == (int(rows["begin"][0]), int(rows["checksum"][0])):
            kept[0] = False  # sent already, and not amended since
        return rows[kept], placed.ms[kept], placed.newest, count

    def _blocks(self, rows: Rows, times: Integers) -> tuple[tuple[Block, ...], int, frozenset[Key]]:
        """Make the block of rows of one revision, before it the end of what the policy no longer has."""
        if not len(rows):
            return (), 0, self.cursor.open
        block, lost = self.columns.block(rows, times)
        keys, opened = self.columns.keys(block), self.cursor.open
        policies = self.columns.policies(int(rows["policy_revision"][0]))
        gone = {key for key in opened - keys if len(key) == 3 and (key[2], key[1]) not in policies}
        if gone or not keys <= opened:
            opened = (opened | keys) - gone
        marker = self._marker(sorted(gone), int(times[0]))
        return (*marker, block), lost, opened

    def _marker(self, keys: Sequence[Key], at_ms: int) -> tuple[Block, ...]:
        series: list[Series] = [made for key in keys if (made := self.columns.series(key)) is not None]
        if not series:
            return ()
        values = np.full((1, len(series)), STALE)
        present = np.ones(values.shape, np.bool_)
        return (Block(times=np.array([at_ms], np.int64), series=tuple(series), values=values, present=present),)

    def _end(self, now: float) -> Reading:
        """End the series of a run that is over, unless a later start of it goes on with them."""
        if self.superseded:
            return Reading(cursor=replace(self.cursor, done=True))
        newest = self.cursor.newest_ms
        at_ms = max(newest + 1, min(int(now * 1000), newest + STALE_AFTER_MS))
        blocks = self._marker(sorted(self.cursor.open), at_ms)
        newest = at_ms if blocks else newest
        return Reading(cursor=replace(self.cursor, newest_ms=newest, open=frozenset(), done=True), blocks=blocks)


def _one_revision(rows: Rows, last: int) -> tuple[Rows, int]:
    """Cut rows where the revision of the policy changes; return the first of them and the sequence they reach."""
    if len(rows):
        others = (rows["policy_revision"] != rows["policy_revision"][0]).nonzero()[0]
        if len(others):
            return rows[: others[0]], int(rows["begin"][others[0]]) - 1
    return rows, last
