"""Conditions on a run, one object each, fed with its rows on the host: numbers only, a few microseconds a step."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from gradiometer.policy.actions import ClipRate, DelayedMean, MaxRatio, SkipRate, When

__all__ = ["Detector", "Seen", "detector"]

Numbers = dict[str, float]


class Seen(NamedTuple):
    """What a condition may look at of one step."""

    step: int
    norm: float
    """Global norm before clipping."""
    skipped: bool
    nonfinite: bool
    clipped: int
    """Bit for each policy slot."""


class Detector(Protocol):
    """One condition and its memory."""

    def see(self, row: Seen) -> Numbers | None:
        """Take in a step; return the numbers that met the condition, None where they do not."""
        ...


class _Streak:
    def __init__(self, limit: int, bad: Callable[[Seen], bool]) -> None:
        self._limit, self._bad, self._count = limit, bad, 0

    def see(self, row: Seen) -> Numbers | None:
        self._count = self._count + 1 if self._bad(row) else 0
        return {"consecutive": self._count, "limit": self._limit} if self._count >= self._limit else None


class _Rate:
    def __init__(self, above: float, window: int, hit: Callable[[Seen], bool]) -> None:
        self._above, self._window, self._hit = above, window, hit
        self._hits, self._count = deque[bool](), 0

    def see(self, row: Seen) -> Numbers | None:
        hit = self._hit(row)
        self._hits.append(hit)
        self._count += hit
        if len(self._hits) > self._window:
            self._count -= self._hits.popleft()
        rate = self._count / self._window
        if len(self._hits) < self._window or rate <= self._above:
            return None
        return {"rate": rate, "above": self._above, "window": self._window}


class _Above:
    def __init__(self, limit: float) -> None:
        self._limit = limit

    def see(self, row: Seen) -> Numbers | None:
        return {"norm": row.norm, "limit": self._limit} if row.norm > self._limit else None


class DelayedMeanDetector:
    """llm-foundry's ``OutlierDetector``: compare with the mean of the ``delay`` norms that are ``delay`` steps old."""

    def __init__(self, setting: DelayedMean) -> None:
        self._setting, self._waiting = setting, deque[float]()
        self._old, self._count = np.zeros(setting.delay), 0
        self.mean = math.nan
        """NaN before there is one."""

    def see(self, row: Seen) -> Numbers | None:
        delay, norm = self._setting.delay, row.norm
        if math.isfinite(norm) or self._setting.compat == "reference":
            if len(self._waiting) >= delay:
                self._old[self._count % delay] = self._waiting.popleft()
                self._count += 1
                self.mean = float(self._old[: min(self._count, delay)].mean())
            self._waiting.append(norm)
        bound = self._setting.ratio * self.mean
        return {"norm": norm, "mean": self.mean, "ratio": self._setting.ratio} if norm > bound else None


class MaxRatioDetector:
    """Megatron's ``is_unexpectedly_large``: compare with the largest of the first finite norms."""

    def __init__(self, setting: MaxRatio) -> None:
        self._setting, self._count = setting, 0
        self.largest = 0.0

    def see(self, row: Seen) -> Numbers | None:
        norm = row.norm
        if not math.isfinite(norm):
            return None
        if self._count < self._setting.samples:
            self._count += 1
            self.largest = max(self.largest, norm)
            return None
        if self.largest <= 0 or norm < self._setting.ratio * self.largest:
            return None
        return {"norm": norm, "largest": self.largest, "ratio": self._setting.ratio}


def detector(when: When, slots: Mapping[str, int]) -> Detector:
    """Make what watches for a condition; ``slots`` are the bits of policies in ``clipped``."""
    return _MAKERS[when.condition](when.setting, slots)


def _clip_rate(setting: ClipRate, slots: Mapping[str, int]) -> Detector:
    bit = 1 << slots[setting.policy]
    return _Rate(setting.above, setting.window, lambda row: bool(row.clipped & bit))


def _skip_rate(setting: SkipRate, slots: Mapping[str, int]) -> Detector:
    del slots
    return _Rate(setting.above, setting.window, lambda row: row.skipped)


_MAKERS: dict[str, Callable[[Any, Mapping[str, int]], Detector]] = {
    "consecutive_skips": lambda limit, _: _Streak(limit, lambda row: row.skipped),
    "consecutive_nonfinite": lambda limit, _: _Streak(limit, lambda row: row.nonfinite),
    "norm_above": lambda limit, _: _Above(limit),
    "clip_rate": _clip_rate,
    "skip_rate": _skip_rate,
    "delayed_mean": lambda setting, _: DelayedMeanDetector(setting),
    "max_ratio": lambda setting, _: MaxRatioDetector(setting),
}
