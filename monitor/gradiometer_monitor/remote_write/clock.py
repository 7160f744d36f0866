"""Give each step a timestamp in milliseconds that no other step of its series has.

A receiver keeps one value a series and millisecond, and most take none that is older than the newest. Steps that share
a millisecond are moved on to the next free one, at most MAX_SHIFT_MS from when they were. The same steps from the same
cursor get the same timestamps again, so that what is sent twice is the same twice.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["MAX_SHIFT_MS", "Placed", "place"]

MAX_SHIFT_MS = 1000
"""Furthest that a timestamp is moved."""
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """Timestamps of rows."""

    ms: Integers
    """int64[T]; what is not kept has none of meaning."""
    kept: npt.NDArray[np.bool_]
    """bool[T]"""
    newest: int
    """Newest timestamp so far."""
    dropped: Counter[str]
    """Rows for which there is none, by reason."""


def place(time_ns: Integers, newest: int, *, window_ms: int = 0) -> Placed:
    """Place rows at int64[T] times after ``newest``, the last timestamp that was given.

    A row that is further behind, the clock having been set back, keeps its own time where the receiver takes it:
    within ``window_ms``. Otherwise it is dropped.
    """
    ms = time_ns // 1_000_000
    if not len(ms) or (ms[0] > newest and (np.diff(ms) > 0).all()):
        latest = int(ms[-1]) if len(ms) else newest
        return Placed(ms=ms, kept=np.ones(len(ms), np.bool_), newest=latest, dropped=Counter())
    chosen, kept, dropped = ms.copy(), np.ones(len(ms), np.bool_), Counter[str]()
    for row, own in enumerate(ms.tolist()):
        if own > newest or newest + 1 - own <= MAX_SHIFT_MS:
            newest = chosen[row] = max(own, newest + 1)
        elif newest - own > window_ms:
            kept[row] = False
            fast = row > 0 and time_ns[row] >= time_ns[row - 1] and newest - own <= 2 * MAX_SHIFT_MS
            dropped["same_millisecond" if fast else "out_of_order"] += 1
    return Placed(ms=chosen, kept=kept, newest=int(newest), dropped=dropped)
