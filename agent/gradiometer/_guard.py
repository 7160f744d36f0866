"""The one place where a telemetry failure stops: caught, counted, warned of once, and training goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import TracebackType

__all__ = ["Guard"]

logger = logging.getLogger(__name__)


class Guard:
    """A context that swallows any ``Exception`` of a piece of telemetry work.

    The first failure is logged with its traceback, all are counted in :attr:`errors` and reported to ``on_error``.
    KeyboardInterrupt and SystemExit pass through. Reusable; not re-entrant across threads.
    """

    def __init__(self, what: str, on_error: Callable[[], None]) -> None:
        self._what, self._on_error = what, on_error
        self.errors = 0

    def __enter__(self) -> None:
        return

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is None:
            return False
        if not isinstance(error, Exception):
            return False
        self.errors += 1
        if self.errors == 1:
            logger.warning(
                "gradiometer: %s failed; training goes on and further failures are only counted "
                "(gradiometer_agent_errors_total)",
                self._what,
                exc_info=error,
            )
        self._on_error()
        return True
