"""How long run directories are kept, and how much room they may take: measured always, bounded when configured."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from logging import getLogger
from pathlib import Path
from typing import Annotated

from gradiometer.prune import DAY_SECONDS, Stored, choose, disk_bytes, find_stored, remove
from gradiometer.tail import Sample
from gradiometer_monitor.config.section import Section, between
from gradiometer_monitor.services import Context, Service

__all__ = ["RetentionService", "RetentionSettings"]

log = getLogger(__name__)

NOTE = "retention/pruned"
SERVED_SECONDS = DAY_SECONDS
"""A run whose series are still served, or are yet to be, stays for at most this long after its end: perhaps nobody
scrapes."""
SHARE = 0.01
"""Share of the time that measuring may take: where there are very many runs it is done less often."""


class RetentionSettings(Section):
    """What is pruned: runs that are over, the oldest first. Nothing is unless one of the two bounds is given."""

    max_age_days: Annotated[float, between(0, 36_525)] | None = None
    """Runs that ended longer ago are removed; 0 removes each once its end was scraped, None keeps all however old."""
    max_bytes: Annotated[int, between(0, 2**62)] | None = None
    """The oldest runs are removed until all take no more; None sets no bound."""
    keep_newest: Annotated[int, between(0, 1_000_000)] = 0
    """How many of the newest runs are kept, whatever the bounds say."""
    interval_seconds: Annotated[float, between(1, 86_400)] = 600.0
    """Pause between two looks at how much room the runs take, and at what is to go."""


class RetentionService(Service):
    """Measures what the run directories take, and prunes them if the settings say so.

    A run whose series are still served, or that the monitor has yet to look at, stays until its series have left, for a
    day. Each removal is an event of kind ``run_pruned``.
    """

    name = "retention"
    sections = ("retention",)

    def __init__(self, settings: RetentionSettings, context: Context) -> None:
        super().__init__()
        self._settings, self._context = settings, context
        self._bytes: int | None = None
        counted = context.store.note(NOTE, {})
        self._runs_pruned, self._bytes_pruned = int(counted.get("runs", 0)), int(counted.get("bytes", 0))
        self._warned: dict[str, str] = {}

    def work(self) -> float:
        """Measure, and prune if it is configured."""
        started = time.monotonic()
        root, settings = self._context.runs.root, self._settings
        if settings.max_age_days is None and settings.max_bytes is None:
            self._bytes = disk_bytes(root)
        else:
            self._prune(root)
        return max(self._settings.interval_seconds, (time.monotonic() - started) / SHARE)

    def _prune(self, root: Path) -> None:
        stored = find_stored(root)
        self._bytes = sum(each.bytes for each in stored)
        chosen = self._chosen(stored)
        if not chosen:
            return
        result = remove(root, chosen, self._removed)
        self._bytes -= result.bytes
        for name, reason in result.kept.items():
            self._warn(name, reason)

    def _chosen(self, stored: Sequence[Stored]) -> list[Stored]:
        settings = self._settings
        late = time.time() - SERVED_SECONDS
        recent = [each for each in stored if not each.rank and each.ended > late]
        chosen = choose(
            stored,
            max_age_seconds=None if settings.max_age_days is None else settings.max_age_days * DAY_SECONDS,
            max_bytes=settings.max_bytes,
            keep={each.run_id for each in recent if not self._context.runs.let_go(each.path)},
            keep_newest=settings.keep_newest,
        )
        return [] if self.stopping.is_set() else chosen

    def _removed(self, each: Stored) -> None:
        """Count and tell one that was removed."""
        self._runs_pruned += 1
        self._bytes_pruned += each.bytes
        days = (time.time() - each.ended) / DAY_SECONDS
        self._context.events.tell(
            each.run_id,
            "run_pruned",
            f"{each.name} ended {days:.1f} days ago and was removed: {each.bytes} bytes are free",
            notes={NOTE: {"runs": self._runs_pruned, "bytes": self._bytes_pruned}},
            name=each.name,
            bytes=each.bytes,
            ended=each.ended,
        )

    def _warn(self, name: str, reason: str) -> None:
        """Log what could not be removed, once for each reason."""
        if self._warned.get(name) != reason:
            self._warned[name] = reason
            log.warning("run %s was to be removed and was not: %s", name, reason)

    def samples(self) -> Iterable[Sample]:
        """Give what is taken, once it was measured, and what was freed."""
        if self._bytes is not None:
            yield "gradiometer_run_directories_bytes", (), self._bytes
        yield "gradiometer_pruned_runs_total", (), self._runs_pruned
        yield "gradiometer_pruned_bytes_total", (), self._bytes_pruned
