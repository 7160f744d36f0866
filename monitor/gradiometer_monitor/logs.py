"""The monitor's log, on stderr: a line a record, as text or JSON, in which nobody else's words can begin a line.

Guarantees: control characters in messages are escaped; lines of a traceback are indented, or within the JSON; what is
said again and again is bounded, and how often it was not said is.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from datetime import UTC, datetime
from typing import Any, Literal

from gradiometer_monitor.config.section import Section

__all__ = ["LogSettings", "configure", "dropped", "escape", "log_to_stderr", "one_line"]

LOGGERS = ("gradiometer", "gradiometer_monitor", "uvicorn")
WINDOW_SECONDS = 60.0
SAME_MESSAGES = 5
"""A message that was logged as often within the window is not logged again in it."""
SAME_KIND = 200
"""As many messages of one kind, which differ in their names and numbers, are logged within a window."""
REMEMBERED = 2000
"""Messages whose count is kept; beyond it the counts begin anew."""
_OWN = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName", "color_message"}


class LogSettings(Section):
    """How the monitor logs, to stderr."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """The least severe that is logged; of the HTTP server's own, warnings and errors."""
    format: Literal["text", "json"] = "text"
    """A line of text for people, or a JSON object a line for log collectors."""


def escape(text: str) -> str:
    """Write what is not printable, such as ends of lines and terminal controls, as Python would in a string."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def one_line(text: str) -> str:
    """Leave the printable words of a text of somebody else's, with one space between them."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


class _Text(logging.Formatter):
    """``time LEVEL message``, and below it the traceback, indented."""

    def format(self, record: logging.LogRecord) -> str:
        line = f"{_time(record)} {record.levelname} {escape(record.getMessage())}"
        return "\n    ".join([line, *map(escape, _traceback(self, record).splitlines())])


class _Json(logging.Formatter):
    """An object a line: ``time``, ``level``, ``logger``, ``message``, what the record adds, and ``exception``."""

    def format(self, record: logging.LogRecord) -> str:
        said: dict[str, Any] = {
            "time": _time(record), "level": record.levelname.lower(), "logger": record.name,
            "message": record.getMessage(),
        }  # fmt: skip
        said |= {name: value for name, value in vars(record).items() if name not in _OWN and name not in said}
        if traceback := _traceback(self, record):
            said["exception"] = traceback
        return json.dumps(said, default=str)


def _time(record: logging.LogRecord) -> str:
    when = datetime.fromtimestamp(record.created, UTC)
    return when.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _traceback(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    if not record.exc_info or record.exc_info[0] is None:
        return ""
    return formatter.formatException(record.exc_info)


class _Bound(logging.Filter):
    """Passes a message a few times in a window, then counts; the next that passes says how many did not."""

    def __init__(self) -> None:
        super().__init__()
        self.dropped = 0
        self._seen: dict[tuple[str, str], list[float]] = {}
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether to log the record; add to its message how many like it were not logged before."""
        try:
            message = record.getMessage()
        except Exception:  # arguments that do not fit: the handler reports that, as it does everywhere
            return True
        with self._lock:
            kind = self._count((record.name, str(record.msg)), SAME_KIND)
            unsaid = self._count((record.name, message), SAME_MESSAGES) if message != record.msg else kind
            if message == record.msg and kind is not None:
                unsaid = self._count((record.name, f"={message}"), SAME_MESSAGES)
            if kind is None or unsaid is None:
                self.dropped += 1
                return False
        if unsaid:
            record.msg, record.args = f"{message} (and {unsaid} times more that were not logged)", ()
        return True

    def _count(self, key: tuple[str, str], limit: int) -> int | None:
        """Count one more; return how many the window before left out, or None if this one is too many."""
        now = time.monotonic()
        if len(self._seen) > REMEMBERED:
            self._seen.clear()
        started, count = self._seen.get(key, [now, 0.0])
        unsaid = 0
        if now - started > WINDOW_SECONDS:
            started, unsaid, count = now, int(max(0.0, count - limit)), 0.0
        self._seen[key] = [started, count + 1]
        return unsaid if count < limit else None


_bound = _Bound()


def dropped() -> int:
    """Return how many messages were not logged, because they had been said often enough."""
    return _bound.dropped


def configure(settings: LogSettings) -> None:
    """Log what this package says, and what uvicorn warns of, to stderr, as the settings say; again after a change."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if settings.format == "json" else _Text())
    handler.addFilter(_bound)
    level = settings.level.upper()
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(max(logging.getLevelName(level), logging.WARNING) if name == "uvicorn" else level)
        logger.propagate = False


def log_to_stderr() -> None:
    """Log as the defaults say, until the settings are known."""
    configure(LogSettings())
