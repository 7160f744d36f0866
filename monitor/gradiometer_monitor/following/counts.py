"""What the monitor counted of each rank, kept in its store, so that no counter falls back when it is started again.

Guarantees: what is kept says up to which row it counts, so that a row is counted once whenever the monitor died. Of a
run whose rows were overwritten in between, those are missed, and counted as such.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable
from logging import getLogger
from typing import Any

from gradiometer.tail import RankTail
from gradiometer_monitor.store import Store

__all__ = ["KEEP_SECONDS", "Counts"]

log = getLogger(__name__)

KEEP_SECONDS = 10.0
"""Pause between two writes. What came after the last is read again from the ring."""
HURRY_SHARE = 0.25
"""Share of its ring that a rank goes on before its counts are written at once: another turn, and what was counted and
not kept could not be read again."""


class Counts:
    """Keeps the counts of ranks in a store, by run, rank and start; without a store it does nothing."""

    def __init__(self, store: Store | None) -> None:
        self._store = store
        self._kept: dict[str, int] = {}
        self._keep_at = 0.0
        self._failing = False

    def recall(self, tail: RankTail) -> dict[str, Any] | None:
        """Return what was counted of this start of the rank by an earlier monitor, if anything was."""
        if self._store is None:
            return None
        try:
            found = self._store.note(_key(tail))
        except (sqlite3.Error, ValueError) as error:
            self._fail(error)
            return None
        return found if isinstance(found, dict) else None

    def keep_some(self, tails: Iterable[RankTail]) -> None:
        """Write the counts of ranks that went on, if it is due; after a poll."""
        tails = list(tails)
        if time.monotonic() < self._keep_at:
            self.keep([tail for tail in tails if self._hurries(tail)])
            return
        self._keep_at = time.monotonic() + KEEP_SECONDS
        self.keep(tails)
        keys = set(map(_key, tails))
        self._kept = {key: sequence for key, sequence in self._kept.items() if key in keys}

    def _hurries(self, tail: RankTail) -> bool:
        went_on = tail.summary.last_seen - self._kept.get(_key(tail), 0)
        return went_on > HURRY_SHARE * tail.manifest.ring.capacity

    def keep(self, tails: Iterable[RankTail]) -> None:
        """Write the counts of ranks that went on since they were last written."""
        if self._store is None:
            return
        moved = {key: tail for tail in tails if self._kept.get(key := _key(tail)) != tail.summary.last_seen}
        notes = {key: tail.summary.counts() for key, tail in moved.items() if tail.summary.last_seen}
        if not notes:
            return
        try:
            self._store.add((), notes)
        except sqlite3.Error as error:
            self._fail(error)
            return
        self._failing = False
        self._kept |= {key: tail.summary.last_seen for key, tail in moved.items()}

    def _fail(self, error: Exception) -> None:
        if not self._failing:
            self._failing = True
            directory = self._store and self._store.directory
            log.warning(
                "counts cannot be kept in state_dir %s and would be lost by a restart (%s): make room "
                "there; they will be tried again",
                directory,
                error,
            )


def _key(tail: RankTail) -> str:
    return f"counts/{tail.run_id}/{tail.rank}/{tail.manifest.created_ns}"
