"""Lines to the standard output, in order, by a thread of its own: who says one never waits for whoever reads.

Guarantees: what waits is bounded by ``MAX_WAITING`` lines; what comes while so many wait is left out, until half of
them were taken, and its number is told in its place. When nobody can read any more, ``gone`` is called, once, and the
rest is left out. A line that cannot be written, as on a full disk, is lost.
"""

from __future__ import annotations

import errno
import os
import select
import sys
import threading
from collections import deque
from collections.abc import Callable

__all__ = ["Output"]

MAX_WAITING = 10_000
"""Lines that wait while nothing takes them, as a pager that shows its first page."""
END_SECONDS = 2.0
"""How long the end waits for lines to be taken."""


class Output:
    """Writes lines to a file descriptor, the standard output unless given; ``gone`` is called in its thread."""

    def __init__(self, gone: Callable[[], None], descriptor: int | None = None) -> None:
        self._gone = gone
        self._descriptor = sys.stdout.fileno() if descriptor is None else descriptor
        self._waiting: deque[str] = deque()
        self._left_out, self._ending = 0, False
        self._changed = threading.Condition()
        # No lock of sys.stdout is held while it writes: the interpreter would wait for that at its end.
        self._thread = threading.Thread(target=self._write_all, name="output", daemon=True)
        self._thread.start()

    def say(self, line: str) -> None:
        """Queue a line, or leave it out where too many wait."""
        with self._changed:
            if len(self._waiting) >= (MAX_WAITING // 2 if self._left_out else MAX_WAITING):
                self._left_out += 1
                return
            self._tell_left_out()
            self._waiting.append(line)
            self._changed.notify()

    def _tell_left_out(self) -> None:
        if self._left_out:
            self._waiting.append(f"({self._left_out} lines were left out here: nothing read them in time)")
            self._left_out = 0

    def end(self) -> None:
        """Write what waits, as far as it is taken within ``END_SECONDS``. Idempotent."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        self._thread.join(END_SECONDS)

    def _write_all(self) -> None:
        while (line := self._next()) is not None:
            try:
                self._write(line)
            except OSError as error:
                if error.errno in (errno.EPIPE, errno.EIO, errno.EBADF):  # the reader, or the terminal, has gone
                    self._gone()
                    return

    def _next(self) -> str | None:
        """Wait for what is to be written; None when there will be nothing more."""
        with self._changed:
            while not self._waiting and not self._left_out and not self._ending:
                self._changed.wait()
            if not self._waiting:
                self._tell_left_out()
            return self._waiting.popleft() if self._waiting else None

    def _write(self, line: str) -> None:
        data = f"{line}\n".encode(sys.stdout.encoding, "backslashreplace")
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except BlockingIOError:  # whoever shares the descriptor has made it so
                select.select([], [self._descriptor], [])
