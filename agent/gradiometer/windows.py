"""What is usual of a stream of norms, and what is not: rolling maxima and ratios, and each layer's own baseline.

Guarantees: what is told depends on the rows alone, wherever the batches were cut in which they came, and memory on the
number of columns alone. NaN and infinite norms poison no median.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from gradiometer.metrics import WINDOW_SECONDS

__all__ = ["BUCKET_NS", "LayerBaseline", "LongestStreak", "Streak", "WindowMax", "WindowRatio", "median_and_mad"]

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

BUCKET_NS = int(WINDOW_SECONDS * 1e9) // 30
BUCKETS = 31
"""One more than the window holds, because the newest is not full: a maximum covers one window to one bucket more."""
EMPTY = -(2**62)
"""Number of no bucket, and far from all that are: times are nanoseconds."""
BASELINE_STEPS = 512
"""Steps whose norms are the baseline: long beside a spike, short beside a schedule of the learning rate."""
SAMPLED_EVERY = 4
"""Of each so many steps one is kept for a layer's baseline: 128 of 512 put its median off by a tenth of a deviation."""
SAMPLES = BASELINE_STEPS // SAMPLED_EVERY
WARMUP_STEPS = 128
"""Nothing is said to be unusual before this many steps: norms of the first ones say little about what is usual."""
MINIMUM_SAMPLES = 32
"""A layer needs as many norms above zero among the samples to have a baseline."""
REFRESH_STEPS = 64
"""Steps after which the medians of layers are computed anew."""
MAX_TURNS = 16
"""Turns in which the medians of very many layers are computed: each turn costs a look at all of them."""
HOLD_STEPS = 20_000
"""A layer that is vanishing or exploding keeps its baseline, or it would soon be usual; after so many steps it is."""
MAD_TO_DEVIATION = 1.4826
"""A normal distribution's standard deviation over its median absolute deviation."""
DEVIATION_FLOOR = 0.1
"""Least deviation of a log norm in a score: what hardly moves at all is not unusual when it moves by a tenth."""
MAX_OPTIMIZERS = 16
"""Optimizers whose streaks are told apart; the others count as the last."""
CHUNK = 4096
"""Layers whose medians are computed at once, which bounds the memory that takes, and the time."""


class _Buckets:
    """The buckets of one window: BUCKETS places, and which bucket of time each of them is of.

    The newest row is the end of the window, and what is a window away from it is forgotten for good: what lies ahead
    as well, after the clock was set back.
    """

    def __init__(self) -> None:
        self._numbers = np.full(BUCKETS, EMPTY)

    @property
    def live(self) -> Mask:
        """Places that hold a bucket of the window, bool[BUCKETS]."""
        held: Mask = self._numbers != EMPTY
        return held

    def place(self, time_ns: Integers) -> Iterator[tuple[int, bool, slice]]:
        """Yield the place of each bucket of rows at int64[T], whether it is to be emptied first, and its rows."""
        buckets = time_ns // BUCKET_NS
        falls = (np.diff(buckets) < 0).nonzero()[0] + 1
        for first, last in pairwise([0, *falls.tolist(), len(buckets)]):
            newest = int(buckets[last - 1])
            self._forget(int(buckets[first]))
            self._forget(newest)
            first += int(np.searchsorted(buckets[first:last], newest - BUCKETS, side="right"))
            changes = np.diff(buckets[first:last]).nonzero()[0] + first + 1
            for start, end in pairwise([first, *changes.tolist(), last]):
                number = int(buckets[start])
                place = number % BUCKETS
                other, self._numbers[place] = self._numbers[place] != number, number
                yield place, bool(other), slice(start, end)

    def _forget(self, newest: int) -> None:
        self._numbers[np.abs(self._numbers - newest) >= BUCKETS] = EMPTY


class WindowMax:
    """Rolling maximum of ``columns`` values over the last WINDOW_SECONDS of the rows' own time.

    Time is cut in buckets of a thirtieth of the window, and one maximum a column is kept for each of the last 31, so
    that a row costs one comparison a column whatever the step rate. The window ends at the newest row, not now: a run
    that stalls keeps its maximum. NaN is passed over, +Inf is not. A clock that was set back by more than the window
    starts a new one.
    """

    def __init__(self, columns: int) -> None:
        self._peaks = np.full((BUCKETS, columns), np.nan)
        self._buckets = _Buckets()

    def add(self, time_ns: Integers, values: Floats) -> None:
        """Take in rows, oldest first: int64[T] and float64[T, columns]; T is at least 1."""
        for place, other, rows in self._buckets.place(time_ns):
            peak = np.fmax.reduce(values[rows], axis=0)
            self._peaks[place] = peak if other else np.fmax(self._peaks[place], peak)

    def max(self) -> Floats:
        """Largest value of each column in the window, float64[columns]; NaN where there was none."""
        peaks: Floats = np.fmax.reduce(self._peaks[self._buckets.live], axis=0, initial=np.nan)
        return peaks


class WindowRatio:
    """Share of the rows in which something was so: of those of the last WINDOW_SECONDS, in the rows' own time.

    Where these are fewer than MINIMUM_SAMPLES, as of a job of long steps, it is the last so many rows.
    """

    def __init__(self) -> None:
        self._counts = np.zeros((BUCKETS, 2), np.int64)
        self._buckets = _Buckets()
        self._last: Mask = np.empty(0, np.bool_)

    def add(self, time_ns: Integers, so: Mask) -> None:
        """Take in rows, oldest first: int64[T] and bool[T]; T is at least 1."""
        self._last = np.concatenate([self._last, so])[-MINIMUM_SAMPLES:]
        for place, other, rows in self._buckets.place(time_ns):
            if other:
                self._counts[place] = 0
            self._counts[place] += np.count_nonzero(so[rows]), len(so[rows])

    @property
    def ratio(self) -> float:
        """From 0 to 1; NaN before MINIMUM_SAMPLES rows, as one or two first steps are no rate."""
        if len(self._last) < MINIMUM_SAMPLES:
            return float("nan")
        so, rows = self._counts[self._buckets.live].sum(axis=0)
        return float(so / rows if rows >= MINIMUM_SAMPLES else self._last.mean())


class LayerBaseline:
    """Median and median absolute deviation of each column's log norms, of a sample of the last BASELINE_STEPS steps.

    In each SAMPLED_EVERY steps one is kept, not always the same: a model whose steps alternate, as with two optimizers,
    is sampled in all of them. Norms that are zero or not finite are passed over. The medians are computed anew every
    REFRESH_STEPS steps, from WARMUP_STEPS on, except for columns that are held. Of very many columns they are computed
    in turns, CHUNK columns at a time: whoever adds rows has others wait.
    """

    def __init__(self, columns: int) -> None:
        self.median: Floats = np.full(columns, np.nan)
        """Median of the log norm, float64[columns]; NaN while there is no baseline."""
        self.mad: Floats = np.full(columns, np.nan)
        """Median absolute deviation from it, float64[columns], in units of the logarithm."""
        self.usual: Floats = np.full(columns, np.nan)
        """The norm whose logarithm the median is, float64[columns]."""
        self.steps = 0
        """Rows that were taken in."""
        self._ring = np.full((columns, SAMPLES), np.nan, np.float32)
        self._written = 0
        self._held: Integers = np.zeros(columns, np.int64)
        turns = 1
        while turns * CHUNK < columns and turns < MAX_TURNS:
            turns *= 2
        self._every, self._width = REFRESH_STEPS // turns, -(-columns // turns)
        """Steps from one turn to the next, and columns of each."""

    @property
    def room(self) -> int:
        """Rows that :meth:`add` may be given before medians are computed anew."""
        return self._every - self.steps % self._every

    def add(self, norms: Floats, held: Mask) -> None:
        """Take in rows, float64[T, columns], oldest first, T at most :attr:`room`.

        Columns that are ``held`` after them keep their medians, for HOLD_STEPS steps in a row at most.
        """
        taken = _sampled(np.arange(self.steps, self.steps + len(norms)))
        self.steps += len(norms)
        self._keep(norms[taken])
        if self.steps >= WARMUP_STEPS and self.steps % self._every == 0:
            first = self.steps % REFRESH_STEPS // self._every * self._width
            self._refresh(slice(first, first + self._width), held)

    def _keep(self, norms: Floats) -> None:
        logs = np.full(norms.shape, np.nan)
        np.log(norms, where=np.isfinite(norms) & (norms > 0), out=logs)
        places = np.arange(self._written, self._written + len(logs)) % SAMPLES
        self._ring[:, places] = logs.T
        self._written += len(logs)

    def _refresh(self, turn: slice, held: Mask) -> None:
        self._held[turn] = np.where(held[turn], self._held[turn] + REFRESH_STEPS, 0)
        keeps = held[turn] & (self._held[turn] <= HOLD_STEPS)
        medians, mads = self.median[turn], self.mad[turn]
        for first in range(0, len(medians), CHUNK):
            part = slice(first, first + CHUNK)
            median, mad = median_and_mad(self._ring[turn][part])
            medians[part] = np.where(keeps[part], medians[part], median)
            mads[part] = np.where(keeps[part], mads[part], mad)
        self.usual[turn] = np.exp(medians)

    def score(self, norms: Floats) -> Floats:
        """Say by how many robust deviations the log of each norm is above the median, float64[columns]; NaN if unknown.

        The deviation is 1.4826 MAD, at least DEVIATION_FLOOR (Iglewicz and Hoaglin, How to Detect and Handle Outliers,
        1993, whose modified z-score it is, of logarithms because norms are skewed and vary by factors).
        """
        deviation = np.maximum(MAD_TO_DEVIATION * self.mad, DEVIATION_FLOOR)
        with np.errstate(divide="ignore"):
            scores: Floats = (np.log(norms) - self.median) / deviation
        return scores


def _sampled(steps: Integers) -> Mask:
    """Choose one in each SAMPLED_EVERY steps by a hash of their place, bool[T]."""
    blocks = (steps // SAMPLED_EVERY).astype(np.uint64)
    mixed = (blocks * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
    chosen: Mask = steps % SAMPLED_EVERY == (mixed % np.uint64(SAMPLED_EVERY)).astype(np.int64)
    return chosen


def median_and_mad(values: npt.NDArray[np.float32]) -> tuple[Floats, Floats]:
    """Return each row's median and median absolute deviation, NaN passed over; float64[C] of [C, N].

    NaN where fewer than MINIMUM_SAMPLES values are known.
    """
    known = np.count_nonzero(~np.isnan(values), axis=1)
    median = _middle(values, known)
    mad = _middle(np.abs(values - median[:, None].astype(np.float32)), known)
    few = known < MINIMUM_SAMPLES
    median[few] = mad[few] = np.nan
    return median, mad


def _middle(values: npt.NDArray[np.float32], known: npt.NDArray[np.intp]) -> Floats:
    ordered = np.sort(values, axis=1)  # NaN come last
    low, high = np.maximum(known - 1, 0) // 2, np.minimum(known // 2, values.shape[1] - 1)
    pairs = np.stack([low, high], axis=1)
    middle: Floats = np.take_along_axis(ordered, pairs, axis=1).mean(axis=1, dtype=np.float64)
    return middle


class Streak:
    """How many rows running something was so in each column; rows in which a column was absent do not count."""

    def __init__(self, columns: int) -> None:
        self.length: Integers = np.zeros(columns, np.int64)

    def add(self, so: Mask, present: Mask) -> None:
        """Take in rows, oldest first: bool[T, columns] each."""
        places = (so.any(axis=0) | (self.length > 0)).nonzero()[0]
        if len(places):
            self.length[places] = _streaks(self.length[places], so[:, places], present[:, places])


def _streaks(length: Integers, so: Mask, present: Mask) -> Integers:
    counted = np.cumsum(so & present, axis=0)
    broken = present & ~so
    last = np.where(broken.any(axis=0), len(so) - 1 - np.argmax(broken[::-1], axis=0), -1)
    before = np.where(last >= 0, counted[last, np.arange(len(length))], -length)
    streaks: Integers = counted[-1] - before
    return streaks


class LongestStreak:
    """Most rows running in which something was so, of the streaks that ended in the last WINDOW_SECONDS or go on.

    Of each optimizer by itself: where two take turns, rows of the one do not end a streak of the other.
    """

    def __init__(self) -> None:
        self._lengths = np.zeros(MAX_OPTIMIZERS, np.int64)
        self._window = WindowMax(1)

    def add(self, time_ns: Integers, so: Mask, optimizers: Integers) -> None:
        """Take in rows, oldest first: int64[T], bool[T] and int64[T]; T is at least 1."""
        if not so.any() and not self._lengths.any():  # the usual case, in which only the window moves on
            self._window.add(time_ns[-1:], np.zeros((1, 1)))
            return
        optimizers = np.minimum(optimizers, MAX_OPTIMIZERS - 1)
        lengths = np.zeros(len(so))
        for each in np.unique(optimizers).tolist():
            mine = optimizers == each
            streaks = _streak_lengths(so[mine], int(self._lengths[each]))
            lengths[mine], self._lengths[each] = streaks, streaks[-1]
        self._window.add(time_ns, lengths[:, None])

    @property
    def rows(self) -> int:
        """0 where there was none."""
        return int(np.nan_to_num(self._window.max()[0]))


def _streak_lengths(so: Mask, before: int) -> Integers:
    """Return for each row how many rows running it was so up to then, int64[T], ``before`` of them before the first."""
    counted = np.cumsum(so)
    lengths: Integers = counted - np.maximum.accumulate(np.where(so, -before, counted))
    return lengths
