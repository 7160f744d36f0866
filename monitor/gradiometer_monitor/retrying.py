"""How long to wait before something that failed is tried again, of its own accord and as an HTTP answer asks for."""

from __future__ import annotations

import math
import random
import time
from email.utils import parsedate_to_datetime

__all__ = ["backoff", "retry_after"]

DOUBLINGS = 20
"""A pause is doubled no more often."""


def backoff(failures: int, first: float, longest: float) -> float:
    """Return the seconds to wait: ``first``, doubled after each of the ``failures`` before, and at most ``longest``.

    They are shortened by chance, to no less than half, so that many who wait do not come back at once.
    """
    return min(first * 2.0 ** min(failures, DOUBLINGS), longest) * random.uniform(0.5, 1.0)


def retry_after(text: str, longest: float) -> float:
    """Read the seconds, at most ``longest``, of a ``Retry-After``, which has them or a date; 0 where it is neither."""
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return 0.0 if math.isnan(seconds) else min(max(seconds, 0.0), longest)
