"""Follow the runs and push each step to one receiver. One such service for each receiver: none is in another's way.

At least once: the cursors are in the store and move after the receiver has taken what is before them, so after a crash
the newest samples are sent again as they were. In memory is one delivery; what waits, waits in the rings.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from logging import getLogger
from pathlib import Path
from typing import Any

from gradiometer.records import Manifest, RunFormatError, rank_directory, rank_of, read_manifest
from gradiometer.tail import Sample
from gradiometer_monitor.remote_write.columns import own_labels
from gradiometer_monitor.remote_write.delivery import Postman, UnavailableError
from gradiometer_monitor.remote_write.feed import Cursor, Feed, Reading, key_of
from gradiometer_monitor.remote_write.pieces import Delivery
from gradiometer_monitor.remote_write.protocol import Block
from gradiometer_monitor.remote_write.receiver import Receiver
from gradiometer_monitor.remote_write.rewind import Rewind
from gradiometer_monitor.remote_write.settings import RemoteWriteSettings
from gradiometer_monitor.services import JOIN_SECONDS, Context, Service

__all__ = ["RemoteWrite"]

log = getLogger(__name__)

GRACE_SECONDS = 3.0
"""What is there when the monitor stops is sent for this long."""
TIDY_SECONDS = 3600.0
"""Pause between two looks at what the store says of runs that are not pushed now."""
BROKEN_SECONDS = 30.0
"""Pause before a ring that could not be read is looked at again."""
MAX_FEEDS = 1024
"""Rank directories that are pushed at once; each holds a file open. More wait until one is done."""
MAX_READINGS = 512
"""Ranks that one request carries at most."""
DROP_REASONS = ("overtaken", "unreadable", "too_old", "out_of_order", "same_millisecond", "future")
FAIL_REASONS = ("rejected", "invalid", "quarantined", "repeated")
OPEN = "open_series/"
"""Before the key of a cursor: its open series."""
RESULTS = ("accepted", "refused", "later")


@dataclass(slots=True)
class _Underway:
    delivery: Delivery
    readings: list[tuple[Feed, Reading]]


class RemoteWrite(Service):
    """Pushes the rows of all runs to one receiver."""

    sections = ("remote_write",)

    def __init__(self, settings: RemoteWriteSettings, context: Context) -> None:
        super().__init__()
        self.name = f"remote_write_{settings.name}"
        self._settings, self._context = settings, context
        self._receiver = Receiver(settings)
        labels = own_labels(settings)
        self._postman = Postman(
            settings.name, self._receiver, labels, self.stopping.is_set, settings.backoff_max_seconds
        )
        self._feeds: dict[str, Feed] = {}
        self._broken: dict[str, float] = {}
        """When to look again at what could not be read (monotonic)."""
        self._underway: _Underway | None = None
        self._rewind = Rewind(settings.rewind_seconds)
        self._turn, self._retry_at, self._greeted = 0, 0.0, False
        self._rows_sent, self._failed = 0, Counter[str]()
        self._dropped: Counter[str] = Counter()
        self._tidy_at, self._discovered_at, self._deadline = 0.0, 0.0, math.inf

    def work(self) -> float:
        """Push what there is; while the receiver is away, only see which runs there are."""
        self._discover()
        wait = self._retry_at - time.monotonic()
        if wait > 0:
            return min(wait, self._settings.flush_seconds)
        try:
            if not self._greeted:
                self._postman.greet()
                self._greeted = True
            while not self.stopping.is_set() and self._advance():
                self._discover_sometimes()
        except UnavailableError as error:
            self._retry_at = time.monotonic() + error.seconds
            return min(error.seconds, self._settings.flush_seconds)
        return self._settings.flush_seconds

    def stop(self, seconds: float = JOIN_SECONDS) -> None:
        """End as every service does; one that outlasts its grace neither sends nor notes anything any more."""
        self._deadline = time.monotonic() + min(GRACE_SECONDS, seconds)
        super().stop(seconds)

    def close(self) -> None:
        """Send what is there, for a moment, and close everything."""
        deadline = min(self._deadline, time.monotonic() + GRACE_SECONDS)
        try:
            while (left := deadline - time.monotonic()) > 0 and self._postman.up and self._advance(left):
                pass
        except UnavailableError:
            log.info("receiver %s is away: what it has not got waits in the rings", self._settings.name)
        except Exception:  # the end must come
            log.exception("receiver %s: the last samples could not be sent", self._settings.name)
        for feed in self._feeds.values():
            feed.close()
        self._receiver.close()

    def samples(self) -> Iterable[Sample]:
        """Give what was sent, lost and waits."""
        name, counts = self._settings.name, self._postman.counts
        yield "gradiometer_remote_write_up", (name,), int(self._postman.up)
        yield "gradiometer_remote_write_samples_sent_total", (name,), counts["sent"]
        yield "gradiometer_remote_write_rows_sent_total", (name,), self._rows_sent
        for reason in FAIL_REASONS:
            yield (
                "gradiometer_remote_write_samples_failed_total",
                (name, reason),
                self._failed[reason] or counts[reason],
            )
        for reason in DROP_REASONS:
            yield "gradiometer_remote_write_rows_dropped_total", (name, reason), self._dropped[reason]
        for result in RESULTS:
            yield "gradiometer_remote_write_requests_total", (name, result), counts[result]
        yield "gradiometer_remote_write_request_seconds_total", (name,), self._postman.request_seconds
        yield "gradiometer_remote_write_bytes_total", (name,), counts["bytes"]
        behind = [feed for feed in list(self._feeds.values()) if feed.pending_rows > 0]
        yield "gradiometer_remote_write_pending_rows", (name,), sum(feed.pending_rows for feed in behind)
        since = [feed.pending_since for feed in behind if feed.pending_since]
        yield "gradiometer_remote_write_pending_seconds", (name,), max(0.0, time.time() - min(since)) if since else 0.0

    def _advance(self, timeout_seconds: float | None = None) -> bool:
        """Send one delivery, begun or new; tell whether there was one."""
        if self._underway is None:
            self._underway = self._gather()
        if self._underway is None:
            return False
        if not self._postman.deliver(self._underway.delivery, timeout_seconds):
            return False
        if time.monotonic() > self._deadline:
            return False  # another may have taken over
        if self._rewind.due(self._postman):
            self._retake()
        else:
            self._settle(self._underway)
        self._underway = None
        return True

    def _retake(self) -> None:
        """Go back where the receiver may have lost what it had taken; what was just sent comes again as well."""
        for key, (path, cursor) in self._rewind.cursors().items():
            self._context.store.add([], {key: cursor.to_json(), OPEN + key: sorted(cursor.open) or None})
            if key in self._feeds:
                self._feeds[key].rewind(cursor)
            elif (found := _find(path, int(key.rpartition("/")[2]))) is not None:
                self._adopt(*found, 0)

    def _gather(self) -> _Underway | None:
        """Take from the feeds in turn, as much as one request carries; None if there is nothing."""
        room, blocks, readings = self._settings.batch_samples, list[Block](), list[tuple[Feed, Reading]]()
        left_out, now, repeated = self._postman.quarantined(), time.time(), False
        for feed in self._in_turn():
            reading = self._read(feed, room, now)
            if reading is None:
                continue
            readings.append((feed, reading))
            repeated |= feed.repeats
            for block in reading.blocks:
                kept = block.without(left_out) if left_out else block
                self._failed["quarantined"] += block.samples - kept.samples
                room -= kept.samples
                blocks.append(kept)
            if room <= 0 or len(readings) >= MAX_READINGS:
                break
        if not readings:
            return None
        # Noted before it is sent: after a crash it is known what the receiver may have had.
        tried = {feed.key: replace(feed.cursor, attempted=each.cursor.sequence).to_json() for feed, each in readings}
        self._context.store.add([], tried)
        return _Underway(Delivery.of(blocks, repeated=repeated), readings)

    def _in_turn(self) -> Iterator[Feed]:
        """Yield the feeds, beginning after the one that was last; of the starts of a rank only the oldest."""
        first: dict[tuple[str, int], Feed] = {}
        for feed in self._feeds.values():
            key = (feed.run_id, feed.rank)
            if key not in first or feed.manifest.created_ns < first[key].manifest.created_ns:
                first[key] = feed
        feeds = list(first.values())
        turn = self._turn % len(feeds) if feeds else 0
        self._turn = turn + 1
        yield from feeds[turn:] + feeds[:turn]

    def _read(self, feed: Feed, room: int, now: float) -> Reading | None:
        try:
            return feed.read(room, now)
        except (OSError, RunFormatError) as error:
            self._leave(feed, error)
            return None

    def _settle(self, underway: _Underway) -> None:
        """Move the cursors, in the store first, and count."""
        readings = underway.readings
        notes: dict[str, Any] = {feed.key: reading.cursor.to_json() for feed, reading in readings}
        for feed, reading in readings:
            if reading.cursor.open is not feed.cursor.open:
                notes[OPEN + feed.key] = sorted(reading.cursor.open) or None
        self._context.store.add([], notes)
        self._rewind.remember(readings)
        for feed, reading in readings:
            feed.settled(reading)
            self._rows_sent += reading.rows
            self._failed["invalid"] += reading.lost
            self._dropped += reading.dropped
            self._tell(feed, reading)
            if feed.cursor.done:
                self._finish(feed)

    def _finish(self, feed: Feed) -> None:
        """Let go of a rank that is over; the next start of it goes on with its series, from its newest timestamp."""
        feed.close()
        self._feeds.pop(feed.key, None)
        later = [each for each in self._feeds.values() if (each.run_id, each.rank) == (feed.run_id, feed.rank)]
        if later:
            heir, done = min(later, key=lambda each: each.manifest.created_ns), feed.cursor
            newest = max(heir.cursor.newest_ms, done.newest_ms)
            heir.cursor = replace(heir.cursor, newest_ms=newest, open=heir.cursor.open | done.open)
            self._context.store.add([], {heir.key: heir.cursor.to_json(), OPEN + heir.key: sorted(heir.cursor.open)})

    def _tell(self, feed: Feed, reading: Reading) -> None:
        """Make an event of the first loss of each kind."""
        name = self._settings.name
        for reason, count in reading.dropped.items():
            if count > 0 and reason not in feed.told:
                feed.told.add(reason)
                message = f"rank {feed.rank}: {count} rows were not pushed to {name} ({reason}); more are only counted"
                self._context.events.tell(feed.run_id, "rows_not_pushed", message, receiver=name, reason=reason)
        if reading.lost and "invalid" not in feed.told:
            feed.told.add("invalid")
            over = feed.columns.layers_over_budget
            why = "; ".join(list(feed.columns.invalid.values())[:3]) or f"{over} layers are beyond series_budget"
            self._context.events.tell(
                feed.run_id,
                "series_not_pushed",
                f"rank {feed.rank}: series are not pushed to {name}: {why}",
                receiver=name,
            )

    def _discover_sometimes(self) -> None:
        if time.monotonic() - self._discovered_at > self._settings.flush_seconds:
            self._discover()

    def _discover(self) -> None:
        """Adopt the ranks that are new, and now and then those that were not done when they went out of sight."""
        self._discovered_at = time.monotonic()
        if self._discovered_at >= self._tidy_at:
            self._resume()
            self._tidy_at = self._discovered_at + TIDY_SECONDS
        with self._context.runs.snapshot() as runs:
            found = [
                (tail.path, tail.manifest, tail.rank == run.ranks[0].rank, tail.summary.last_seen)
                for run in runs
                for tail in run.ranks
            ]
        for known in list(self._feeds.values()):
            try:
                known.look()
            except OSError as error:
                self._leave(known, error)
        for path, manifest, lead, rows in found:
            self._adopt(path, manifest, rows)
            feed = self._feeds.get(self._key(path, manifest))
            if feed is not None:
                feed.columns.with_layers = lead

    def _key(self, path: Path, manifest: Manifest) -> str:
        return key_of(self._settings.name, path.parent.name, rank_of(path), manifest.created_ns)

    def _adopt(self, path: Path, manifest: Manifest, rows: int) -> None:
        key = self._key(path, manifest)
        if key in self._feeds or len(self._feeds) >= MAX_FEEDS or self._broken.get(key, 0.0) > time.monotonic():
            return
        store = self._context.store
        note = store.note(key)
        cursor = Cursor() if note is None else Cursor.from_json(note, store.note(OPEN + key, ()))
        if cursor.done and rows <= cursor.sequence:
            return
        try:
            feed = Feed(path, manifest, self._settings, cursor)
        except (OSError, RunFormatError) as error:
            self._broken[key] = time.monotonic() + BROKEN_SECONDS
            log.warning("%s cannot be read and is not pushed to %s: %s", path, self._settings.name, error)
            return
        if note is None:
            self._begin(feed)
        for other in self._feeds.values():
            if (other.run_id, other.rank) == (feed.run_id, feed.rank):
                older = min(other, feed, key=lambda each: each.manifest.created_ns)
                older.superseded = True
        self._feeds[key] = feed

    def _begin(self, feed: Feed) -> None:
        """Place the cursor of a rank that is met for the first time."""
        started = self._started()
        new = feed.manifest.created_ns >= started
        oldest = time.time() - self._settings.max_age_seconds
        feed.begin(after=0.0 if new else oldest if self._settings.backfill else None)
        earlier = self._context.store.notes(f"remote_write/{self._settings.name}/{feed.run_id}/{feed.rank}/")
        newest = max((note["newest_ms"] for note in earlier.values()), default=0)
        feed.cursor = replace(feed.cursor, newest_ms=newest)
        self._context.store.put(feed.key, feed.cursor.to_json())

    def _started(self) -> int:
        """Return when this receiver was first there, in nanoseconds since the epoch: later runs are sent whole."""
        key = f"remote_write_started/{self._settings.name}"
        found = self._context.store.note(key)
        if found is None:
            found = time.time_ns()
            self._context.store.put(key, found)
        return int(found)

    def _resume(self) -> None:
        """Take up what is not done, also of runs that are no longer shown, and forget runs that were removed."""
        self._started()
        self._broken = {key: until for key, until in self._broken.items() if until > time.monotonic()}
        prefix = f"remote_write/{self._settings.name}/"
        for key, note in self._context.store.notes(prefix).items():
            run_id, rank, created = key.removeprefix(prefix).split("/")
            path = rank_directory(self._context.runs.root / run_id, int(rank))
            if not path.parent.is_dir():
                self._context.store.add([], {key: None, OPEN + key: None})
            elif not note["done"] and key not in self._feeds and (found := _find(path, int(created))) is not None:
                self._adopt(*found, 0)

    def _leave(self, feed: Feed, error: Exception) -> None:
        log.warning("%s cannot be read and is not pushed to %s for now: %s", feed.path, self._settings.name, error)
        feed.close()
        self._feeds.pop(feed.key, None)
        self._broken[feed.key] = time.monotonic() + BROKEN_SECONDS


def _find(path: Path, created_ns: int) -> tuple[Path, Manifest] | None:
    """Find the directory of one start of a rank: a later start has moved it aside, as ``rank-00000.1``."""
    for candidate in (path, *sorted(path.parent.glob(f"{path.name}.*"))):
        try:
            manifest = read_manifest(candidate / "manifest.json")
        except (OSError, RunFormatError):
            continue
        if manifest.created_ns == created_ns:
            return candidate, manifest
    return None
