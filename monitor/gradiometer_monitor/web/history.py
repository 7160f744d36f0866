"""The rows of a run, down-sampled: read from the rings once, kept in a cache of bounded size, merged on demand.

Guarantees: only whole rows are used, as :class:`gradiometer.records.RingReader` returns them; readers take no lock that
a writer could wait for; a request holds CHUNK_BYTES of rows, the buckets of one history and its answer, whatever the
size of the ring. What is final is read once: the row at the head may still be given its loss, and is read each time.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gradiometer.records import Manifest, RingReader, Rows
from gradiometer.windows import BASELINE_STEPS
from gradiometer_monitor.web.buckets import Buckets, StatNorms, bucket_rows, merge, newer

__all__ = ["History", "HistoryCache", "Selection", "Source"]

Floats = npt.NDArray[np.float64]

CHUNK_BYTES = 8 * 2**20
"""Bytes of rows read at once; a row that is larger is read alone."""
BASE_BUCKETS = 4096
"""Buckets of a whole ring that are kept, at most twice as many; a run with more layers keeps fewer."""
BASE_BYTES = 16 * 2**20
"""Bytes of layers that the buckets of one history may take, as far as BASE_BUCKETS_LEAST allows."""
BASE_BUCKETS_LEAST = 256
CACHE_BYTES = 256 * 2**20
"""Bytes of all histories that are kept; beyond it the one that was asked for the longest ago goes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One rank's ring, as it was found: a later one of the same name has another identity."""

    path: Path
    identity: tuple[int, int]
    manifest: Manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Which rows are asked for, all unless it says so, and in how many buckets; it is widened to whole buckets."""

    from_step: int | None = None
    to_step: int | None = None
    after_sequence: int | None = None
    points: int = 1000
    level: int = 0
    """Buckets of at least 2**level rows, so that they continue those of an earlier answer."""

    def of(self, buckets: Buckets) -> Buckets:
        """Leave the span of buckets from the first to the last that hold a row asked for."""
        scalars = buckets.scalars
        backwards = self.from_step is not None and self.to_step is not None and self.from_step > self.to_step
        asked = np.full(len(scalars), not backwards)
        if self.from_step is not None:
            asked &= scalars["last_step"] >= self.from_step
        if self.to_step is not None:
            asked &= scalars["step"] <= self.to_step
        if self.after_sequence is not None:
            asked &= scalars["last"] > self.after_sequence
        found = np.flatnonzero(asked)
        return buckets[found[0] : found[-1] + 1] if len(found) else buckets[:0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """Answer to a selection."""

    buckets: Buckets
    level: int
    baseline: Floats
    """Median of the last finite norms up to the end of each bucket, float64[B]; NaN before the first."""
    complete: bool
    """The ring still held every row of the selection, and none of them was lost."""
    head: int
    """Sequence of the newest row."""


class History:
    """Down-sampled rows of one rank and one stat; safe to use from several threads."""

    def __init__(self, source: Source, stat: str) -> None:
        self.source = source
        self._norms = StatNorms(source.manifest, stat)
        self.lock = threading.Lock()
        ring = source.manifest.ring
        wanted = min(BASE_BUCKETS, max(BASE_BUCKETS_LEAST, BASE_BYTES // (5 * self._norms.count)))
        self.level = max(0, (-(-ring.capacity // wanted) - 1).bit_length())
        """Kept are buckets of 2**level rows."""
        self._limit = max(1, CHUNK_BYTES // ring.dtype.itemsize)
        self._base, self._read = Buckets.empty(self._norms.count), 0
        self._finite = np.empty(0), np.empty(0, np.int64)

    @property
    def nbytes(self) -> int:
        return self._base.nbytes + sum(part.nbytes for part in self._finite)

    def select(self, selection: Selection) -> Window:
        """Read what is new, and return the buckets asked for. Raises OSError or RunFormatError."""
        with self.lock, self._ring() as ring:
            head = self._follow(ring)
            newest = self._newest(ring, head)
            known = merge([self._base, newest], self.level)
            found = selection.of(known)
            level = self._level(found, selection)
            if level >= self.level:
                found = selection.of(merge([known], level))
            elif len(found):
                found = self._finer(ring, selection, found, newest, level)
            oldest = max(1, head + 1 - self.source.manifest.ring.capacity)
            return Window(
                buckets=found,
                level=level,
                baseline=self._baseline(found, newest),
                complete=_complete(found, selection, oldest),
                head=max(head, int(newest.scalars["last"][-1])) if len(newest) else head,
            )

    @contextmanager
    def _ring(self) -> Iterator[RingReader]:
        ring = RingReader(self.source.path / "steps.ring", self.source.manifest.ring)
        try:
            yield ring
        finally:
            ring.close()

    def _follow(self, ring: RingReader) -> int:
        """Take in the final rows that came, and return the sequence of the newest row."""
        head = int(ring.status()["head"])
        parts, finite = [self._base], [self._finite]
        first = max(self._read, head - ring.geometry.capacity)
        while first < head - 1:
            rows, first = _next(ring, first, min(first + self._limit, head - 1))
            if not len(rows):
                continue
            parts.append(bucket_rows(rows, self._norms, self.level))
            good = np.isfinite(rows["grad_norm_preclip"])
            finite.append((rows["grad_norm_preclip"][good], rows["begin"][good].astype(np.int64)))
        self._read = max(first, self._read)
        oldest = max(1, head + 1 - ring.geometry.capacity)
        if len(parts) > 1:
            self._base = merge(parts, self.level)
            norms, places = (np.concatenate(each) for each in zip(*finite, strict=True))
            start = max(0, int(np.searchsorted(places, oldest)) - BASELINE_STEPS)
            self._finite = norms[start:], places[start:]
        self._base = newer(self._base, oldest)
        return head

    def _newest(self, ring: RingReader, head: int) -> Buckets:
        """Read the row at the head as it is now, and the one after it, which a writer that died left without a word."""
        if not head:
            return Buckets.empty(self._norms.count)
        return bucket_rows(ring.read(max(self._read, head - 1), 2), self._norms, 0)

    def _level(self, found: Buckets, selection: Selection) -> int:
        """Choose the finest level that gives at most as many buckets as asked for."""
        level = selection.level
        if not len(found):
            return level
        first, last = int(found.scalars["first"][0]) - 1, int(found.scalars["last"][-1]) - 1
        if selection.after_sequence is not None:
            first = max(first, selection.after_sequence)
        while (last >> level) - (first >> level) + 1 > selection.points:
            level += 1
        return level

    def _finer(self, ring: RingReader, selection: Selection, found: Buckets, newest: Buckets, level: int) -> Buckets:
        """Read the rows of the buckets ``found`` again, for smaller ones."""
        first, last = int(found.scalars["first"][0]) - 1, int(found.scalars["last"][-1])
        if selection.after_sequence is not None:
            first = max(first, (selection.after_sequence >> level) << level)
        parts = [newest[:0]]
        end = min(last, self._read)
        while first < end:
            rows, first = _next(ring, first, min(first + self._limit, end))
            parts.append(bucket_rows(rows, self._norms, level))
        return selection.of(merge([*parts, newest], level))

    def _baseline(self, found: Buckets, newest: Buckets) -> Floats:
        norms, places = self._finite
        recent = newest.scalars[np.isfinite(newest.scalars["grad_norm_preclip"])]
        norms = np.concatenate([norms, recent["grad_norm_preclip"]])
        places = np.concatenate([places, recent["last"]])
        return _rolling_median(norms, np.searchsorted(places, found.scalars["last"], side="right"))


def _next(ring: RingReader, after: int, last: int) -> tuple[Rows, int]:
    """Read the rows after one sequence and up to another, which is returned with them.

    Those that a writer overtook are missing; the ring then gives later ones in their place, which are not of this part.
    """
    rows = ring.read(after, last - after)
    return rows[rows["begin"] <= last], last


def _rolling_median(values: Floats, ends: npt.NDArray[np.intp]) -> Floats:
    """Take the median of the BASELINE_STEPS values before each of ``ends``, as many as there are."""
    medians = np.full(len(ends), np.nan)
    full = ends >= BASELINE_STEPS
    if full.any():
        windows = np.lib.stride_tricks.sliding_window_view(values, BASELINE_STEPS)
        medians[full] = np.median(windows[ends[full] - BASELINE_STEPS], axis=1)
    for place in np.flatnonzero(~full & (ends > 0)):
        medians[place] = np.median(values[: ends[place]])
    return medians


def _complete(found: Buckets, selection: Selection, oldest: int) -> bool:
    """Tell whether no row of the selection is missing, be it overwritten or lost in a crash."""
    scalars = found.scalars
    if not len(scalars):
        return oldest == 1 or (selection.after_sequence or 0) >= oldest - 1
    held = int(scalars["last"][-1]) - int(scalars["first"][0]) + 1 == int(scalars["rows"].sum())
    if int(scalars["first"][0]) > oldest or oldest == 1:
        return held
    wanted = selection.from_step is not None and int(scalars["step"][0]) <= selection.from_step
    return held and (wanted or (selection.after_sequence or 0) >= oldest - 1)


class HistoryCache:
    """Histories that were asked for lately, CACHE_BYTES of them; safe to use from several threads."""

    def __init__(self, limit: int = CACHE_BYTES) -> None:
        self._limit, self._lock = limit, threading.Lock()
        self._held: OrderedDict[tuple[Path, tuple[int, int], str], History] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes of the histories that are kept."""
        with self._lock:
            return sum(held.nbytes for held in self._held.values())

    def select(self, source: Source, stat: str, selection: Selection) -> Window:
        """Answer a selection from the history of ``source``. Raises OSError or RunFormatError."""
        key = (source.path, source.identity, stat)
        with self._lock:
            history = self._held.get(key) or History(source, stat)
            self._held[key] = history
            self._held.move_to_end(key)
        try:
            return history.select(selection)
        finally:
            self._trim()

    def _trim(self) -> None:
        with self._lock:
            total = sum(held.nbytes for held in self._held.values())
            while total > self._limit and self._held:
                total -= self._held.popitem(last=False)[1].nbytes
