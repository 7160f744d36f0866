"""What was sent shortly before: for a receiver that acknowledges samples and forgets them when it crashes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from gradiometer_monitor.remote_write.delivery import Postman
from gradiometer_monitor.remote_write.feed import Cursor, Feed, Reading

__all__ = ["Rewind"]

MAX_REMEMBERED = 100_000
"""Cursors that are remembered; beyond it the oldest are forgotten."""


class Rewind:
    """Remembers where feeds stood in the last ``seconds``, and tells when to go back there: after the connection broke.

    With 0 seconds it does nothing.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._sent: deque[tuple[float, str, Path, Cursor]] = deque(maxlen=MAX_REMEMBERED)
        self._connection: object = None
        self._breaks, self._rewound_at = 0, float("-inf")

    def remember(self, readings: Sequence[tuple[Feed, Reading]]) -> None:
        """Keep where feeds stood before these readings, which have been taken."""
        if not self._seconds:
            return
        while self._sent and self._sent[0][0] < self._sent[-1][0] - self._seconds:
            self._sent.popleft()
        now = time.monotonic()
        self._sent.extend((now, feed.key, feed.path, feed.cursor) for feed, _ in readings)

    def due(self, postman: Postman) -> bool:
        """Tell whether the receiver may have been started anew: it was not there, or answers on another connection.

        The latter counts once in ``seconds``: there are networks that let no connection live.
        """
        breaks, connection = self._breaks, self._connection
        self._breaks, self._connection = postman.counts["broken"], postman.connection
        now = time.monotonic()
        calm = now - self._rewound_at > self._seconds
        other = connection is not None and self._connection != connection and calm
        due = bool(self._seconds and self._sent and (other or breaks != self._breaks))
        self._rewound_at = now if due else self._rewound_at
        return due

    def cursors(self) -> dict[str, tuple[Path, Cursor]]:
        """Return the oldest cursor of each feed that is remembered, with its directory, and forget them."""
        found: dict[str, tuple[Path, Cursor]] = {}
        for _, key, path, cursor in self._sent:
            found.setdefault(key, (path, cursor))
        self._sent.clear()
        return found
