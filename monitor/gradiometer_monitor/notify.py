"""Tell systemd how the monitor is: the datagrams of sd_notify(3), where the service manager asks for them."""

from __future__ import annotations

import os
import socket
import time
from logging import getLogger

__all__ = ["notify", "watchdog_seconds"]

log = getLogger(__name__)


def notify(*states: str) -> None:
    """Send ``READY=1`` and the like to ``$NOTIFY_SOCKET``; without one, or if it fails, nothing happens."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if "RELOADING=1" in states:
        states = (*states, f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as speaker:
            speaker.sendto("\n".join(states).encode(), address.replace("@", "\0", 1) if address[0] == "@" else address)
    except OSError as error:
        log.warning("systemd could not be told %s: %s", states[0], error)


def watchdog_seconds() -> float | None:
    """Return how often systemd is to be told that all is well: twice in the time it allows; None if it asks not."""
    allowed, process = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    if not allowed.isdigit() or int(allowed) == 0 or process not in ("", str(os.getpid())):
        return None
    return int(allowed) / 2e6
