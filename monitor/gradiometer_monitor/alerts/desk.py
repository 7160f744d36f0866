"""Where the webhook finds the service that takes alerts, which a reload replaces."""

from __future__ import annotations

from typing import Protocol

from gradiometer_monitor.alerts.payload import Accepted, Notification

__all__ = ["Desk", "FullError", "Taker"]


class FullError(Exception):
    """Alerts cannot be kept now; the same may be sent again."""


class Taker(Protocol):
    """What takes alerts."""

    def accept(self, notification: Notification, by: str) -> Accepted:
        """Keep what concerns this monitor, to be done soon. Raises FullError."""


class Desk:
    """Holds the service that takes alerts, if there is one."""

    def __init__(self) -> None:
        self.taker: Taker | None = None
